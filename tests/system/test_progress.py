"""Progress of work on many cases: a bar on a terminal, a few lines in a log, nothing for short work."""

import io
import re
import sys
import time

import pytest

from nnunet_dycon.system import progress
from nnunet_dycon.system.progress import with_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch, bar_after: float) -> Terminal:
    """Replace sys.stderr; not in a fixture, since pytest replaces it again after the set-up of a test."""
    monkeypatch.setattr(progress, "_BAR_AFTER", bar_after)
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


@pytest.fixture
def clock(monkeypatch):
    """Return a list with the time in seconds, which the test can change."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def work(number: int, seconds: float, clock: list[float]):
    for each in range(number):
        clock[0] += seconds
        yield each


def test_log_gets_a_line_with_the_remaining_time_every_10_percent(clock, capsys):
    assert list(with_progress(work(1000, 6, clock), 1000, "scoring")) == list(range(1000))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "scoring: 100/1000 cases, 1:30:00 remaining"
    assert [line.split()[1] for line in lines] == [f"{done}/1000" for done in range(100, 1000, 100)]


def test_log_lines_are_at_least_30_seconds_apart(clock, capsys):
    list(with_progress(work(100, 0.8, clock), 100, "scoring"))
    shown = re.findall(r"(\d+)/100 cases, (\S+) remaining", capsys.readouterr().err)
    assert shown == [("38", "00:49"), ("76", "00:19")]


def test_short_work_writes_nothing_to_a_log(clock, capsys):
    list(with_progress(work(100, 0.2, clock), 100, "scoring"))
    list(with_progress(iter(()), 0, "scoring"))
    assert capsys.readouterr().err == ""


def test_short_work_shows_no_bar(monkeypatch):
    terminal = on_terminal(monkeypatch, bar_after=60)
    assert list(with_progress(range(100), 100, "scoring")) == list(range(100))
    assert list(with_progress(iter(()), 0, "scoring")) == []
    assert terminal.getvalue() == ""


def test_bar_appears_before_the_first_result(monkeypatch):
    terminal = on_terminal(monkeypatch, bar_after=0.01)

    def results():
        deadline = time.monotonic() + 30
        while "0/2 cases" not in terminal.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield from "ab"

    assert list(with_progress(results(), 2, "scoring")) == ["a", "b"]
    shown = terminal.getvalue()
    assert "scoring:   0%" in shown
    assert re.search(r"scoring: 100%.*2/2 cases, 00:00 remaining\n$", shown)


def test_bar_ends_with_a_line_break_if_the_first_result_is_an_error(monkeypatch):
    terminal = on_terminal(monkeypatch, bar_after=0.01)

    def results():
        while "0/2 cases" not in terminal.getvalue():
            time.sleep(0.01)
        raise ValueError("damaged")
        yield

    with pytest.raises(ValueError, match="damaged"):
        list(with_progress(results(), 2, "scoring"))
    assert terminal.getvalue().endswith("\n")

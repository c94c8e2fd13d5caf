"""Tests of `make gpu-check` with stand-in commands instead of benchmarks and trainings."""

import argparse
import json
import os
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Step, counts, perform, run_limited, steps
from benchmarks.gpu_training import alternate
from tests.processes import is_running

COMMIT = {"commit": "abc"}
ABOUT = {"device": "GPU", "versions": {"torch": "2.6"}}
WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2]);"


def stand_in(name: str, code: str, result: dict, fraction: float = 0.9) -> Step:
    command = ["-c", WRITE + code, "{file}", json.dumps(result)]
    return Step(name, fraction, command, lambda its: f"{name} has {len(its)} values")


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """Return a parsed command line of gpu_check."""

    def parse(*options: str) -> argparse.Namespace:
        caught = []
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--work", str(tmp_path), *options])
        monkeypatch.setattr(gpu_check, "steps", lambda arguments: caught.append(arguments) or [])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(SystemExit):
            gpu_check.main()
        monkeypatch.undo()
        return caught[0]

    return parse


def test_a_failed_or_stopped_step_does_not_stop_the_others(tmp_path, capsys):
    performed = [
        stand_in("environment", "", ABOUT),
        stand_in("failing", "raise SystemExit(3)", {"results": 1}),
        stand_in("hanging", "import time; time.sleep(60)", {"results": 2}, fraction=0.01),
        Step("silent", 0.9, ["-c", ""], str),
        stand_in("last", "", {"results": 3, "commit": "unknown"}),
    ]
    rows = perform(performed, time.monotonic() + 100, tmp_path / "results", tmp_path / "logs", COMMIT)
    assert [row[:2] for row in rows] == [
        ("environment", "ok"),
        ("failing", "failed (exit code 3)"),
        ("hanging", "stopped after 1 s"),
        ("silent", "failed (no result)"),
        ("last", "ok"),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[4].startswith("[5/5] last: ok, ")
    assert lines[4].endswith("s; last has 2 values")
    files = sorted((tmp_path / "results").iterdir())
    assert [file.name for file in files] == [
        f"gpu_{name}.json" for name in ("environment", "failing", "hanging", "last", "silent")
    ]
    written = {file.stem: json.loads(file.read_text()) for file in files}
    for its in written.values():
        assert its.items() >= (ABOUT | COMMIT).items()
    assert written["gpu_hanging"]["results"] == 2
    assert written["gpu_hanging"]["status"] == "stopped after 1 s"


def test_result_of_an_earlier_run_is_not_used(tmp_path):
    (tmp_path / "silent.out").write_text("{}")
    steps = [Step("silent", 0.9, ["-c", ""], str)]
    ((_, status, *_),) = perform(steps, time.monotonic() + 100, tmp_path, tmp_path, COMMIT)
    assert status == "failed (no result)"


def test_successful_result_is_not_replaced_by_that_of_a_stopped_step(tmp_path, capsys):
    deadline = time.monotonic() + 100
    for code in ("", "raise SystemExit(1)"):
        environment = stand_in("environment", "", ABOUT)
        perform([environment, stand_in("losses", code, {"results": code})], deadline, tmp_path, tmp_path, COMMIT)
    written = json.loads((tmp_path / "gpu_losses.json").read_text())
    assert (written["status"], written["results"]) == ("ok", "")
    assert "failed (exit code 1)" in capsys.readouterr().out


def test_device_and_versions_are_kept_if_their_step_is_stopped_after_its_result(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_IMPORT_SECONDS", 1)
    steps = [stand_in("environment", "import time; time.sleep(60)", ABOUT, 0), stand_in("losses", "", {})]
    rows = perform(steps, time.monotonic() + 100, tmp_path, tmp_path, COMMIT)
    assert [status for _, status, *_ in rows] == ["stopped after 1 s", "ok"]
    assert json.loads((tmp_path / "gpu_losses.json").read_text()).items() >= (ABOUT | COMMIT).items()


def test_steps_that_need_data_are_skipped_without_it(tmp_path, capsys):
    steps = [stand_in("data", "raise SystemExit(1)", {}), Step("training", 0.9, ["-c", ""], str, needs_data=True)]
    rows = perform(steps, time.monotonic() + 100, tmp_path, tmp_path, COMMIT)
    assert [status for _, status, *_ in rows] == ["failed (exit code 1)", "skipped"]
    assert "[2/2] training: skipped; there is no data" in capsys.readouterr().out


def test_results_contain_no_absolute_paths(tmp_path):
    code = "print('File \"/home/me/.venv/lib/torch/nn.py\", line 3: /data/LA is no folder'); raise SystemExit(1)"
    perform([stand_in("failing", code, {})], time.monotonic() + 100, tmp_path, tmp_path, COMMIT)
    (line,) = json.loads((tmp_path / "gpu_failing.json").read_text())["last_lines_of_log"]
    assert line == 'File "nn.py", line 3: LA is no folder'


def test_limits_are_fractions_of_the_time_left(tmp_path, monkeypatch):
    clock, limits = [0.0], []

    def run(command, log, seconds):
        log.touch()
        limits.append(seconds)
        clock[0] += 10
        assert command[1:] == [f"{seconds:.0f}"]
        return "ok"

    monkeypatch.setattr(gpu_check, "run_limited", run)
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(gpu_check, "_IMPORT_SECONDS", 12)
    performed = [Step("step", fraction, ["{seconds}"], str) for fraction in (0.1, 0.5, 1.0)]
    perform(performed, 100, tmp_path, tmp_path, COMMIT)
    assert limits == [12, 45, 80]


def test_time_limit_ends_the_processes_of_a_step(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
    log = tmp_path / "log"
    assert run_limited([sys.executable, "-c", f"{code}; import time; time.sleep(60)"], log, 2) == "stopped after 2 s"
    process = int(log.read_text())
    deadline = time.monotonic() + 10
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(process)


@pytest.mark.parametrize("options", [[], ["--device", "cpu", "--tiny"]], ids=["default", "tiny"])
def test_commands_of_the_steps_are_valid(parsed, options, monkeypatch):
    class ParsedError(Exception):
        pass

    original = argparse.ArgumentParser.parse_args

    def parse_args(self):
        raise ParsedError(original(self))

    found = steps(parsed(*options))
    assert [step.name for step in found] == [
        "environment", "data", "tests", "train_step", "loader", "losses", "training",
    ]  # fmt: skip
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    for step in found:
        if step.name != "tests":
            monkeypatch.setattr(
                sys, "argv", [*step.command[1:2], *(part.replace("{seconds}", "9") for part in step.command[2:])]
            )
            with pytest.raises(ParsedError):
                import_module(step.command[1]).main()


def test_without_cuda_one_line_is_printed_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        sys, "argv", ["gpu_check", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    )
    with pytest.raises(SystemExit) as raised:
        gpu_check.main()
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: PyTorch finds no CUDA device; ")
    assert "--device cpu" in captured.err
    assert not os.listdir(tmp_path)


def test_counts_of_tests():
    suite = '<testsuites><testsuite errors="1" failures="2" skipped="3" tests="9"></testsuite></testsuites>'
    assert counts(suite) == {"tests": 9, "failures": 2, "errors": 1, "skipped": 3}
    skipped = suite.replace('"9"', '"3"')
    assert counts(skipped, may_skip=True)["skipped"] == 3
    with pytest.raises(ValueError, match="all tests were skipped"):
        counts(skipped)


def test_missing_data_folder_is_refused(parsed, capsys):
    with pytest.raises(IndexError):  # the check does not start
        parsed("--data", "nowhere")
    assert "--data: nowhere is no folder" in capsys.readouterr().err


class Trainings:
    """Stand-in for trainings: epochs take a constant time, and each turn has a start-up time."""

    def __init__(self, seconds: dict[str, float], startup: float = 5.0, broken: tuple[str, ...] = ()) -> None:
        self.seconds, self.startup, self.broken = seconds, startup, broken
        self.epochs: dict[str, list[float]] = {name: [] for name in seconds}
        self.clock = 0.0
        self.turns: list[tuple[str, int]] = []

    def turn(self, name: str, until: int, seconds: float) -> None:
        self.turns.append((name, until))
        end = self.clock + seconds
        self.clock += self.startup
        while name not in self.broken and len(self.epochs[name]) < until and self.clock + self.seconds[name] <= end:
            self.clock += self.seconds[name]
            self.epochs[name].append(self.seconds[name])

    def run(self, epochs: int, deadline: float) -> list[int]:
        alternate(self.seconds, self.turn, self.epochs.__getitem__, epochs, deadline, lambda: self.clock)
        return [len(its) for its in self.epochs.values()]


def test_trainings_alternate_and_share_the_time():
    trainings = Trainings({"a": 10, "b": 20})
    assert trainings.run(50, 400) == [11, 11]
    assert trainings.turns == [(name, until) for until in (1, 4, 10, 11) for name in "ab"]
    assert trainings.clock <= 400


def test_trainings_resume_and_end_when_they_are_complete():
    trainings = Trainings({"a": 10, "b": 20})
    trainings.epochs["a"] += [10, 10]
    assert trainings.run(5, 1000) == [5, 5]
    assert trainings.turns[0] == ("b", 1)
    turns = len(trainings.turns)
    assert trainings.run(5, 2000) == [5, 5]
    assert len(trainings.turns) == turns


def test_training_that_fails_or_is_too_slow_does_not_stop_the_others():
    assert Trainings({"a": 10, "b": 10, "c": 500}, broken=("a",)).run(5, 200) == [0, 5, 0]

"""Progress of work on many cases, on stderr: a bar on a terminal, and a few lines in a log file."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

_BAR_AFTER = 2.0  # seconds; shorter work shows no bar
_LINE_EVERY = 30.0  # seconds, the shortest time between two lines; shorter work writes no line
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} cases, {remaining} remaining"
Result = TypeVar("Result")


def with_progress(results: Iterable[Result], total: int, title: str) -> Iterator[Result]:
    """Yield the results, and show how many of them there are and the remaining time.

    On a terminal, a bar appears on stderr after 2 seconds. Otherwise, a line is written to stderr for every 10 % of the
    results, but none within 30 seconds of the start or of the last line.

    Args:
        results: one result for each case, computed while they are consumed.
        total: number of cases.
        title: what is done, such as "scoring".
    """
    if sys.stderr.isatty():
        yield from _with_bar(results, total, title)
    else:
        yield from _with_lines(results, total, title)


def _with_bar(results: Iterable[Result], total: int, title: str) -> Iterator[Result]:
    # The mean speed (smoothing=0), because the results of several processes arrive in groups.
    with tqdm(results, desc=title, total=total, delay=_BAR_AFTER, smoothing=0, bar_format=_BAR) as bar:

        def show() -> None:
            bar.delay = 0
            bar.refresh()

        timer = threading.Timer(_BAR_AFTER, show)  # tqdm alone would wait for the first result
        timer.daemon = True
        timer.start()
        try:
            yield from bar
        finally:
            timer.cancel()


def _with_lines(results: Iterable[Result], total: int, title: str) -> Iterator[Result]:
    start = last = time.monotonic()
    tenths = 0
    for done, result in enumerate(results, 1):
        now = time.monotonic()
        if done < total and done * 10 // total > tenths and now - last >= _LINE_EVERY:
            last, tenths = now, done * 10 // total
            remaining = tqdm.format_interval((now - start) / done * (total - done))
            print(f"{title}: {done}/{total} cases, {remaining} remaining", file=sys.stderr, flush=True)
        yield result

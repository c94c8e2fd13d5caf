"""Processes: parallel processing of cases, exit on SIGTERM, peak memory, and the path of a command."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from nnunet_dycon.errors import UserError
from nnunet_dycon.system.progress import with_progress

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
Job = TypeVar("Job")
Result = TypeVar("Result")


def map_cases(
    function: Callable[[Job], Result], jobs: Sequence[Job], num_processes: int, title: str
) -> Iterator[Result]:
    """Yield function(job) for each job, in the order of the jobs, and show the progress on stderr.

    If the function raises an exception in a worker process, the exception is raised in this process, too, and the jobs
    that have not started yet are cancelled.

    Args:
        function: a picklable function with one picklable argument and a picklable result.
        jobs: arguments of the function, one for each call, such as files.
        num_processes: number of worker processes; with 1, the function runs in this process.
        title: what is done, for the progress and errors, such as "scoring".

    Raises:
        UserError: a worker process was killed.
    """

    if num_processes == 1 or len(jobs) <= 1:
        yield from with_progress(map(function, jobs), len(jobs), title)
        return
    # Spawn instead of fork, because forking a process with running torch threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, len(jobs)), context, initializer=end_with_parent) as pool:
        try:
            yield from with_progress(pool.map(function, jobs), len(jobs), title)
        except BrokenProcessPool:
            raise UserError(
                f"{title}: a worker process was killed, perhaps for lack of memory; run again with -np 1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """Return a context in which SIGTERM raises SystemExit instead of ending the process at once.

    `with` blocks can then end worker processes and remove temporary folders.

    Only the main thread can change the handling of signals; in other threads nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def end_with_parent() -> None:
    """Start a thread that ends this process as soon as its parent process has ended.

    Otherwise, it would continue to run and to occupy memory after its parent was killed.
    """

    def wait_and_end() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def find_command(name: str) -> str:
    """Return the path of a command in the folder of the Python interpreter or, if it is not there, in PATH.

    Raises:
        UserError: the command is in neither.
    """
    installed = Path(sys.executable).with_name(name)
    found = str(installed) if installed.is_file() else shutil.which(name)
    if found is None:
        raise UserError(
            f"the command {name} is neither in {installed.parent} nor in PATH; run: pip install nnunet-dycon"
        )
    return found


def parent_death_signal() -> Callable[[], None] | None:
    """Return a function for `subprocess.Popen(preexec_fn=...)` that lets the new process end with this one.

    The new process receives SIGTERM when this process ends, also by SIGKILL. Only Linux supports this; on other
    systems, the result is None.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded before the fork
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes.

    Outside of Linux, it includes the memory of the process that started this one.
    """
    if (status := Path("/proc/self/status")).is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    import resource  # does not exist on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Parallel processing of cases in worker processes."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from nnunet_dycon.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def map_cases(
    function: Callable[[Job], Result], jobs: Sequence[Job], num_processes: int, title: str
) -> Iterator[Result]:
    """Yield function(job) for each job, in order, and show a progress bar on stderr.

    Exceptions of the function are raised here. Jobs that have not started by then are dropped.

    Args:
        function: a picklable function with picklable arguments and results.
        jobs: the arguments.
        num_processes: number of worker processes; 1 uses this process.
        title: title of the progress bar.

    Raises:
        UserError: a worker process was killed.
    """

    def with_progress(results: Iterable[Result]) -> Iterator[Result]:
        return iter(tqdm(results, total=len(jobs), desc=title, unit="case", disable=not jobs or None))

    if num_processes == 1 or len(jobs) <= 1:
        yield from with_progress(map(function, jobs))
        return
    # Spawn instead of fork, because forking a process with running torch threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, len(jobs)), mp_context=context) as pool:
        try:
            yield from with_progress(pool.map(function, jobs))
        except BrokenProcessPool:
            raise UserError(
                f"{title}: a process was killed, perhaps for lack of memory; run again with fewer processes: -np 1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

"""Work on many cases at once, in processes of their own."""

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
    """Yield function(job) for each job, in their order, behind a progress bar on stderr.

    Args:
        function: picklable, as are jobs and results.
        jobs: what to work on.
        num_processes: 1 works in this process.
        title: of the progress bar.

    Raises:
        UserError: a process was killed. What the function raises comes through, and the jobs not begun are dropped.
    """

    def with_progress(results: Iterable[Result]) -> Iterator[Result]:
        return iter(tqdm(results, total=len(jobs), desc=title, unit="case", disable=not jobs or None))

    if num_processes == 1 or len(jobs) <= 1:
        yield from with_progress(map(function, jobs))
        return
    # Spawned, not forked: torch does not survive a fork while its threads run.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, len(jobs)), mp_context=context) as pool:
        try:
            yield from with_progress(pool.map(function, jobs))
        except BrokenProcessPool:
            raise UserError(
                f"{title}: a process was killed, perhaps for want of memory; run again with fewer processes, -np 1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

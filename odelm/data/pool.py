"""Work in pieces, over several processes, with a bar that tells how far it is."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from odelm.errors import SystemFailure

Job = TypeVar("Job")

SLOW = 3
"""From so many pieces on the bar is shown: fewer, such as one a split, are done before it tells anything."""


def run(function: Callable[[Job], None], jobs: Sequence[Job], *, workers: int, what: str, total: int) -> None:
    """Calls `function` with each job, in `workers` processes (in this one for 0 or 1), telling of `total` pieces.

    The first exception stops what has not begun, and is raised. The pieces of `total` beyond the jobs were done
    before.
    """
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=len(jobs) < SLOW) as progress:
        task = progress.add_task(what, total=total, completed=total - len(jobs))
        for _ in _each(function, jobs, min(workers, len(jobs))):
            progress.advance(task)


def _each(function: Callable[[Job], None], jobs: Sequence[Job], workers: int) -> Iterator[None]:
    if workers <= 1:
        yield from map(function, jobs)
        return
    # JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_alone) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise SystemFailure(
                "a worker was killed, perhaps for want of memory; what is finished is kept: run the same command with "
                "fewer workers"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _alone() -> None:
    """Keeps a worker to one core: the tokenizers library takes all that there are."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

"""ArrayRecord files, read at any place, and how several processes share the work of writing them."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from array_record.python.array_record_module import ArrayRecordWriter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from odelm.errors import SystemFailure
from odelm.interrupts import deaf_children

Job = TypeVar("Job")

MIN_JOBS_FOR_BAR = 3
"""Fewer jobs, such as one for each split, show no progress bar."""


@contextlib.contextmanager
def record_writer(path: Path, *, compress: bool = True) -> Iterator[ArrayRecordWriter]:
    """Yields a writer of single records; raises OSError if not all of them could be written, as on a full disk."""
    with as_os_error():
        writer = ArrayRecordWriter(str(path), "group_size:1" if compress else "group_size:1,uncompressed")
        yield writer
        writer.close()


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """Turns the RuntimeError that ArrayRecord raises for a file that could not be written into an OSError."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"\w+\(\) failed", str(error)):
            raise
        raise OSError(" ".join(str(error).split())) from error


def run_jobs(function: Callable[[Job], None], jobs: Sequence[Job], *, workers: int, what: str, total: int) -> None:
    """Calls `function` with each job, in `workers` processes (0 or 1: in this process), with a progress bar.

    The bar counts to `total`: these jobs, and those that an earlier call finished. The first exception cancels the jobs
    that have not started, and is raised.
    """
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=len(jobs) < MIN_JOBS_FOR_BAR) as progress:
        task = progress.add_task(what, total=total, completed=total - len(jobs))
        for _ in _finished(function, jobs, min(workers, len(jobs))):
            progress.advance(task)


def _finished(function: Callable[[Job], None], jobs: Sequence[Job], workers: int) -> Iterator[None]:
    """Yields once for each finished job."""
    if workers <= 1:
        yield from map(function, jobs)
        return
    # JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_use_one_core) as pool:
        with deaf_children():
            futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise SystemFailure(
                "a worker process was killed (out of memory?). Finished work is kept; run the same command again with "
                "fewer workers"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _use_one_core() -> None:
    """Limits a worker to one core: the tokenizers library would use all of them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

"""Programs compiled side by side, where the backend allows it."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item], *, runs: bool = True) -> list[Result]:
    """Returns `function(item)` for each item; the calls, each of which compiles a program, overlap where that is safe.

    On a GPU they do not: XLA times kernels while it compiles, and another compilation would disturb that. `runs` says
    that the calls run their programs too: then they overlap on a single CPU device only, because programs that wait for
    other devices could wait for each other. For TPUs programs are only compiled side by side.
    """
    return list(one_by_one(function, items, runs=runs))


def one_by_one(function: Callable[[Item], Result], items: Iterable[Item], *, runs: bool = True) -> Iterator[Result]:
    """Yields what `side_by_side` returns, in order, each result as soon as it and those before it are there."""
    backend = jax.default_backend()
    overlap = backend == "cpu" and jax.device_count() == 1 if runs else backend in ("cpu", "tpu")
    with ThreadPoolExecutor(os.cpu_count() if overlap else 1) as pool:
        yield from pool.map(function, items)

"""Programs compiled side by side, where the backend allows it."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item], *, runs: bool = True) -> list[Result]:
    """Returns `function(item)` for each item; on a CPU the calls, each of which compiles a program, overlap.

    On a GPU XLA times kernels while it compiles, and another compilation would disturb that. On a TPU it has not been
    tried; of programs for an absent slice libtpu compiles one after the other, whatever the number of threads. `runs`
    says that the calls run their programs too: then they overlap on a single device only, because programs that wait
    for other devices could wait for each other.
    """
    overlap = jax.default_backend() == "cpu" and not (runs and jax.device_count() > 1)
    with ThreadPoolExecutor(os.cpu_count() if overlap else 1) as pool:
        return list(pool.map(function, items))

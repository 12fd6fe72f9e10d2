"""Latencies of compiled calls, measured side by side."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call."""

    median: float
    p90: float


def measure(calls: Mapping[Name, Callable[[], Any]], *, repeats: int = 30, warmup: int = 3) -> dict[Name, Latency]:
    """Times each call `repeats` times until its result is ready, taking turns.

    Taking turns lets every call meet the same noise of a shared machine, so that their ratios hold. The
    warm-up, which compiles, is not counted.
    """
    for call in calls.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Latency(1e3 * float(np.median(times)), 1e3 * float(np.quantile(times, 0.9)))
        for name, times in seconds.items()
    }

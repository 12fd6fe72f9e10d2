"""The cases of `benchmarks.inference`, and how a call is timed."""

import statistics
import time
from collections.abc import Callable
from typing import Any

ENCODERS = {
    "tiny": {"width": 64, "heads": 4, "depth": 4},
    "base": {"width": 768, "heads": 12, "depth": 12},
    "large": {"width": 1024, "heads": 16, "depth": 24},
}
ENCODER_WORDS = 30_000
Times = dict[str, float]
"""Seconds of a token or a pass, by how it is computed."""
Measure = Callable[[], Times]
"""Times what has been compiled."""


def median_seconds(call: Callable[[], Any], wait: Callable[[], None], repeats: int, warmup: int = 3) -> float:
    """Returns the median of the seconds that a call takes until it is done."""
    for _ in range(warmup):
        call()
    found = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found)

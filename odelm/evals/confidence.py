"""How much loss a coarse crossing costs, how well that is known, and which of several keeps a limit. Pure functions.

Two crossings are compared on the same rows of text, so that what the rows have in common cancels: the increase is known
far better than either loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
"""Of the bounds, which are one-sided."""


@dataclass(frozen=True)
class Ratio:
    """The ratio of two sums over rows, as a sample of all such rows."""

    value: float
    stderr: float
    bound: float
    """The value is below it at a confidence of `CONFIDENCE`, in the long run over samples."""


def ratio_of(x: np.ndarray, n: np.ndarray) -> Ratio:
    """Returns the ratio of the sums of `x` and `n`, float (rows,) each, with its error by rows.

    The ratio estimator of Cochran 1977, Sampling Techniques, section 2.11, as in `odelm.models.loss.mean_loss`, and
    Student's t for few rows. The bound is infinite for a single row, and where something is not finite.
    """
    x, n = np.asarray(x, np.float64), np.asarray(n, np.float64)
    rows, total = len(n), n.sum()
    value = float(x.sum() / total)
    if rows < 2 or not math.isfinite(value):
        return Ratio(value, math.nan, math.inf)
    stderr = float(np.sqrt(np.square(x - value * n).sum() * rows / (rows - 1)) / total)
    return Ratio(value, stderr, value + float(stdtrit(rows - 1, CONFIDENCE)) * stderr)


def increase_of(full: np.ndarray, coarse: np.ndarray) -> Ratio:
    """Returns the increase of the loss relative to full depth, from the nats of each row, float (rows,)."""
    return ratio_of(np.asarray(coarse, np.float64) - full, full)


def in_test_order(evaluations: Sequence[int], increases: Sequence[float], limit: float) -> list[int]:
    """Returns which candidates to test, the most expensive first, by what was seen where they were searched.

    One of each number of evaluations, the one that loses least. Those that were above the limit are left out, and those
    that a cheaper one beats: they would cost the test power, and would not be chosen.
    """
    chosen: list[int] = []
    for number in sorted(range(len(evaluations)), key=lambda number: (evaluations[number], increases[number])):
        if increases[number] <= limit and (not chosen or _better(number, chosen[-1], evaluations, increases)):
            chosen.append(number)
    return chosen[::-1]


def _better(number: int, other: int, evaluations: Sequence[int], increases: Sequence[float]) -> bool:
    return evaluations[number] > evaluations[other] and increases[number] < increases[other]


def last_within(bounds: Sequence[float], limit: float) -> int | None:
    """Returns the place of the last bound before the first that is above the limit; None if the first one is.

    Fixed-sequence testing: because the order was fixed before these bounds were seen, and nothing after the first
    failure counts, the chance that any accepted one is truly above the limit is that of a single test (Maurer, Hothorn
    and Lehmacher 1995; Angelopoulos et al. 2021, arXiv 2110.01052).
    """
    passed = 0
    while passed < len(bounds) and bounds[passed] <= limit:
        passed += 1
    return passed - 1 if passed else None

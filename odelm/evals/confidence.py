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
class Increase:
    """Of the loss, relative to full depth: 0.005 is half a per cent."""

    value: float
    bound: float
    """The value is below it at a confidence of `CONFIDENCE`, in the long run over samples."""


def increase_of(full: np.ndarray, coarse: np.ndarray) -> Increase:
    """Returns the increase from the nats at full depth to those of a coarse crossing, both summed over each of some
    units of text, float (units,).

    The units are what was drawn at random and what others will be drawn like: documents, whose rows are alike in what
    coarse steps cost them. The error of the ratio of the two sums is that of the delete-one jackknife (Cochran 1977,
    Sampling Techniques, section 6.17), which the usual formula falls short of where units are few and unequal. So does
    Student's t with the number of units: it takes Kish's effective number, that of equal units which would do as well.
    The bound is infinite for a single unit, and where something is not finite.
    """
    full, coarse = np.asarray(full, np.float64), np.asarray(coarse, np.float64)
    units, total = len(full), full.sum()
    value = float(coarse.sum() / total - 1)
    if units < 2 or not math.isfinite(value):
        return Increase(value, math.inf)
    without = (coarse.sum() - coarse) / (total - full) - 1
    stderr = math.sqrt((units - 1) / units * np.square(without - value).sum())
    effective = float(total**2 / np.square(full).sum())
    return Increase(value, value + float(stdtrit(effective - 1, CONFIDENCE)) * stderr)


def in_test_order(evaluations: Sequence[int], increases: Sequence[float]) -> list[int]:
    """Returns which candidates to test, the most expensive first, by what was seen where they were searched.

    One of each number of evaluations, the one that loses least. Those that a cheaper one beats are left out: they would
    not be chosen if that one passes, and testing them first would only cost power. So each is expected to lose more
    than the one before.
    """
    chosen: list[int] = []
    for number in sorted(range(len(evaluations)), key=lambda number: (evaluations[number], increases[number])):
        if math.isfinite(increases[number]) and (not chosen or _better(number, chosen[-1], evaluations, increases)):
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

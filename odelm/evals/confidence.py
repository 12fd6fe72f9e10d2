"""How much a coarse crossing increases the loss, with a confidence bound, and which crossing keeps a limit. Pure
functions.

Two crossings are compared on the same rows of text, so that what the rows have in common cancels: the increase is known
far better than either loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
"""The confidence of the bounds, which are one-sided."""


@dataclass(frozen=True)
class Increase:
    """An increase of the loss, relative to full depth: 0.005 is half a per cent."""

    value: float
    bound: float
    """The true increase is below this bound at a confidence of `CONFIDENCE`, in the long run over samples."""


def increase_of(full: np.ndarray, coarse: np.ndarray) -> Increase:
    """Returns the increase of the loss from full depth to a coarse crossing, given the nats of both, summed over each
    unit of text, float (units,).

    The units are what was sampled at random, as other text will be: documents, whose rows have similar costs of coarse
    steps. The error of the ratio of the two sums is that of the delete-one jackknife (Cochran 1977, Sampling
    Techniques, section 6.17); the usual formula underestimates it if units are few and unequal. So would Student's t
    with the number of units: it takes Kish's effective number instead, the number of equal units that would be as
    precise. The bound is infinite for a single unit, and if a value is not finite.
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
    """Returns which candidates to test, the most expensive first, given their increases on the text that was searched.

    For each number of evaluations this is the candidate that loses least. A candidate that a cheaper one beats is left
    out: it would not be chosen if the cheaper one passes, and testing it first would only cost power. So each candidate
    is expected to lose more than the one before.
    """
    chosen: list[int] = []
    for number in sorted(range(len(evaluations)), key=lambda number: (evaluations[number], increases[number])):
        if math.isfinite(increases[number]) and (not chosen or _better(number, chosen[-1], evaluations, increases)):
            chosen.append(number)
    return chosen[::-1]


def _better(number: int, other: int, evaluations: Sequence[int], increases: Sequence[float]) -> bool:
    return evaluations[number] > evaluations[other] and increases[number] < increases[other]


def last_within(bounds: Sequence[float], limit: float) -> int | None:
    """Returns the index of the last bound before the first that is above the limit; None if the first one is.

    Fixed-sequence testing: because the order was fixed before these bounds were seen, and nothing after the first
    failure counts, the chance that any accepted one is truly above the limit is that of a single test (Maurer, Hothorn
    and Lehmacher 1995; Angelopoulos et al. 2021, arXiv 2110.01052).
    """
    passed = 0
    while passed < len(bounds) and bounds[passed] <= limit:
        passed += 1
    return passed - 1 if passed else None

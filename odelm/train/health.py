"""Signs that a run goes wrong, reported while it can still be stopped: a loss that jumps, and one no better than token
frequencies."""

import math
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np

from odelm.data.examples import TaskData
from odelm.data.tokens import Prepared

RECORDS = 10
"""How many of the last records a loss is compared with."""
SPIKE = 0.3
"""A loss this many nats per token above the worst of those records is called a jump; records of tens of updates scatter
by less."""
COLLAPSE = 0.02
"""A loss within this share of the entropy of token frequencies is called no better than the frequencies."""
SAMPLE = 1_000_000
"""The number of tokens on which the frequencies are counted."""


class Losses:
    """The training losses of the last records."""

    def __init__(self, before: Iterable[float] = ()) -> None:
        """`before` is what `kept` returned when the run was saved."""
        self._recent = deque(before, maxlen=RECORDS)

    def kept(self) -> list[float]:
        """Returns the losses that the next one is compared with."""
        return list(self._recent)

    def jumped(self, loss: float | None) -> str | None:
        """Returns a warning about the next record's loss, None if there is nothing to report."""
        if loss is None:
            return None
        worst = max(self._recent) if len(self._recent) == RECORDS else math.inf
        self._recent.append(loss)
        if loss < worst + SPIKE:
            return None
        return f"the loss has jumped to {loss:.3f}: it was at most {worst:.3f} in the {RECORDS} records before"


def collapsed(losses: Mapping[int, float], entropy: float) -> str | None:
    """Returns a warning if all held-out losses, by steps, are those of predicting token frequencies, whose entropy is
    `entropy` nats; None otherwise."""
    if not losses or any(abs(loss / entropy - 1) > COLLAPSE for loss in losses.values()):
        return None
    return (
        f"the model predicts no more than token frequencies do ({entropy:.3f} nats a token), at every number of steps: "
        "it may have collapsed, or be on the plateau that masked models stay on at first"
    )


def token_entropy(prepared: Prepared | TaskData) -> float:
    """Returns the entropy of token frequencies, in nats, of the first tokens of each component of a corpus; infinity
    for a task, whose model predicts no tokens."""
    if isinstance(prepared, TaskData):
        return math.inf
    streams = list(prepared.train.values())
    parts = [stream.tokens[: max(SAMPLE // len(streams), 1)] for stream in streams]
    counts = np.bincount(np.concatenate([np.asarray(part) for part in parts]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())

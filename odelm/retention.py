"""Which checkpoints of a run stay on disk: the newest, and those kept by step, by time and by loss."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orbax.checkpoint import checkpoint_managers as managers

from odelm.config import TrainConfig


@dataclass
class Saved:
    """What decides whether a checkpoint stays."""

    step: int
    time: datetime.datetime
    metrics: dict[str, Any] | None
    """`loss`, held-out at full depth; None if it was not evaluated at that step."""


def superseded(saved: Sequence[Saved], options: TrainConfig) -> list[int]:
    """Returns the steps that need not stay, of checkpoints in ascending order."""
    policies: list[managers.PreservationPolicy] = [managers.LatestN(options.keep)]
    if options.keep_every:
        policies.append(managers.EveryNSteps(options.keep_every))
    if options.keep_minutes:
        policies.append(managers.EveryNSeconds(max(round(60 * options.keep_minutes), 1)))
    if options.keep_best:
        best = managers.BestN(
            get_metric_fn=lambda metrics: metrics["loss"],
            reverse=True,
            n=options.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
    policy = managers.AnyPreservationPolicy(policies)
    stays = policy.should_preserve(saved, context=managers.PreservationContext())
    return [one.step for one, kept in zip(saved, stays, strict=True) if not kept]

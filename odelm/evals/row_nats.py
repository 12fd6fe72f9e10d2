"""The nats of each row of a half of the held-out text, for several crossings of the depth."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from odelm.compiling import side_by_side
from odelm.evals.halves import Part
from odelm.evals.sweep import Setting
from odelm.infer.runner import Runner
from odelm.models.local_error import local_errors
from odelm.models.loss import Batch, inputs_of, row_losses
from odelm.models.transformer import DepthPlan

Nats = dict[Setting, np.ndarray]
"""The nats of each row, float (rows,), by how the depth was crossed."""


@dataclass(frozen=True)
class Half:
    """Rows of text in batches of one shape."""

    batches: Sequence[Batch]
    tokens: np.ndarray
    """How many tokens each row predicts, float (rows,); rows of padding are cut off."""
    part: Part

    @classmethod
    def of(cls, part: Part, size: int) -> "Half":
        """Returns the rows of a part in batches of so many."""
        batches = [jax.device_put(batch) for batch in part.rows.batches(size)]
        tokens = np.concatenate([np.asarray(batch["weights"]).sum(axis=1) for batch in batches])
        return cls(batches, tokens[: len(part.rows)], part)

    def first(self, count: int) -> "Half":
        """Returns the first `count` batches of this half."""
        batches = self.batches[:count]
        rows = sum(len(batch["weights"]) for batch in batches)
        part = dataclasses.replace(self.part, units=self.part.units[:rows])
        return Half(batches, self.tokens[:rows], part)

    def by_unit(self, nats: np.ndarray) -> np.ndarray:
        """Returns the nats of rows, summed over each unit, float (units,)."""
        return np.asarray(np.bincount(self.part.units, weights=nats))


def losses_of(runner: Runner, chosen: Sequence[Setting], half: Half) -> Nats:
    """Returns the nats of each row for each setting. A program is compiled for each number of steps and of stages, and
    takes the grid as an argument."""
    first = {(setting.solver, *(part.times.shape for part in setting.plan(runner))): setting for setting in chosen}
    side_by_side(lambda setting: _nats(runner, setting, half.batches[:1]), first.values())
    return {setting: _nats(runner, setting, half.batches)[: len(half.tokens)] for setting in chosen}


def errors_of(runner: Runner, batches: Iterable[Batch]) -> np.ndarray:
    """Returns the mean of the local errors over batches, float (C, C + 1)."""
    found = jax.jit(lambda params, data: local_errors(nnx.merge(runner.graph, params), inputs_of(data)))
    return np.asarray(
        np.mean([jax.device_get(found(runner.params, data)) for data in batches], axis=0, dtype=np.float64)
    )


def _nats(runner: Runner, setting: Setting, batches: Iterable[Batch]) -> np.ndarray:
    plan = setting.plan(runner)
    found = [_row_losses(runner.graph, runner.params, plan, data) for data in batches]
    return np.concatenate([np.asarray(nats, np.float64) for nats, _ in jax.device_get(found)])


@partial(jax.jit, static_argnums=0)
def _row_losses(graph: nnx.GraphDef, params: Any, plan: DepthPlan, data: Batch) -> tuple[jax.Array, jax.Array]:
    return row_losses(nnx.merge(graph, params), data, plan=plan)

"""Evaluation of a task: loss and official metrics at several step counts, on the examples that are held out."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from odelm import sharding
from odelm.compiling import side_by_side
from odelm.config import Config
from odelm.data.examples import HeldOutExamples, TaskData
from odelm.data.scores import TaskScores
from odelm.data.tokens import Prepared
from odelm.models.loss import Batch, LossSums, mean_loss, scored_examples
from odelm.ode import grid
from odelm.train.evaluate import HeldOut
from odelm.train.log import Log

Scored = Callable[[Any, Batch, Any], tuple[LossSums, jax.Array]]


class HeldOutTask(HeldOut):
    """The evaluated examples of a task, the loss and the metrics on them, and the losses recorded before."""

    def __init__(self, config: Config, graph: nnx.GraphDef, data: TaskData, mesh: Mesh, log: Log):
        super().__init__(config, graph, data, mesh, log)
        self._data, self._scored = data, make_scored(graph, mesh)

    def evaluate(self, step: int, params: Any) -> dict[int, float]:
        """Returns the losses after update `step` by number of steps, full depth first, and records them with the
        metrics."""
        core = self._config.model.core
        grids = {steps: grid.equal(core, steps) for steps in self._config.eval_steps}
        # The first call at each count compiles.
        side_by_side(lambda times: jax.block_until_ready(self._scored(params, self._batches[0], times)), grids.values())
        losses, by_steps = {}, {}
        for steps, times in grids.items():
            # One at a time: several programs in flight that wait for other processes could deadlock.
            found = [jax.device_get(self._scored(params, batch, times)) for batch in self._batches]
            losses[steps] = mean_loss(sums for sums, _ in found)
            by_steps[steps] = self._rows.scores(np.concatenate([outputs for _, outputs in found]))
        self._record(step, params, losses, TaskScores(by_steps, self._rows.majority(), len(self._rows)))
        return {steps: mean.loss for steps, mean in losses.items()}

    def baseline(self, step: int, params: Any) -> dict[int, float]:
        """Returns {}: before its head is trained a classifier has no loss to compare with."""
        return {}

    @cached_property
    def _components(self) -> dict[str, list[Batch]]:
        return {}

    @cached_property
    def _rows(self) -> HeldOutExamples:
        return self._data.held_out(self._limit)


def make_held_out(config: Config, graph: nnx.GraphDef, data: Prepared | TaskData, mesh: Mesh, log: Log) -> HeldOut:
    """Returns the held-out batches of a run: of a task if it has one, else of its text."""
    if isinstance(data, TaskData):
        return HeldOutTask(config, graph, data, mesh, log)
    return HeldOut(config, graph, data, mesh, log)


def make_scored(graph: nnx.GraphDef, mesh: Mesh) -> Scored:
    """Returns the jitted `scored(params, batch, grid) -> (loss, outputs)`, compiled once for each number of steps.

    The outputs, float32 (B, outputs), are those of the whole batch on every process.
    """

    def scored(params: Any, batch: Batch, times: jax.Array) -> tuple[LossSums, jax.Array]:
        model = nnx.merge(graph, params)
        return scored_examples(model, batch, plan=model.plan(grid=times))

    return jax.jit(scored, out_shardings=sharding.replicated(mesh))

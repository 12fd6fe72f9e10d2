"""Held-out loss at several step counts."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from odelm import sharding
from odelm.compiling import side_by_side
from odelm.config import Config
from odelm.data.loader import HeldOutRows, held_out_rows
from odelm.data.tokens import Prepared
from odelm.models.loss import Batch, LossSums, MeanLoss, loss_sums, mean_loss
from odelm.ode import grid
from odelm.train.log import Log

LossFunction = Callable[[Any, Batch, Any], LossSums]


class HeldOut:
    """The held-out batches of a run, the loss on them, and the losses that the run recorded before."""

    def __init__(self, config: Config, graph: nnx.GraphDef, prepared: Prepared, mesh: Mesh, log: Log):
        self._config, self._prepared, self._mesh, self._log = config, prepared, mesh, log
        self._loss = make_loss(graph)

    def evaluate(self, step: int, params: Any) -> dict[int, float]:
        """Returns the losses after update `step` by number of steps, full depth first, and records them."""
        losses = evaluate(self._loss, params, self._batches, self._config)
        self._log.evaluation(step, losses, batches=self._config.train.eval_batches, documents=self._rows.documents)
        return {steps: mean.loss for steps, mean in losses.items()}

    def recorded(self, step: int) -> dict[int, float]:
        """Returns the losses after update `step` if all were recorded before, else {}: the same on every process."""
        counts = self._config.eval_steps
        found = self._log.evaluated(step, self._config.train.eval_batches)
        losses = multihost_utils.broadcast_one_to_all(np.array([found.get(count, np.nan) for count in counts]))
        return {} if np.isnan(losses).any() else dict(zip(counts, losses.tolist(), strict=True))

    def baseline(self, step: int, params: Any) -> dict[int, float]:
        """Returns the losses of the pretrained model that the run started from, {} if it started from a new one.

        They are evaluated at step 0, and recorded.
        """
        if not self._config.init.from_pretrained:
            return {}
        losses = self.recorded(0)
        return self.evaluate(0, params) if not losses and step == 0 else losses

    @cached_property
    def _rows(self) -> HeldOutRows:
        options = self._config.train
        return held_out_rows(self._prepared, self._config, limit=options.eval_batches * options.batch_size)

    @cached_property
    def _batches(self) -> list[Batch]:
        """The evaluated batches, split over the processes like those of training."""
        share, shares = sharding.batch_share(self._mesh)
        rows = self._config.train.batch_size // shares
        mine = slice(share * rows, (share + 1) * rows)
        batches = self._rows.batches(self._config.train.batch_size)
        return [sharding.place_batch({name: a[mine] for name, a in b.items()}, self._mesh) for b in batches]


def make_loss(graph: nnx.GraphDef, *, solver: str = "euler") -> LossFunction:
    """Returns the jitted `loss(params, batch, grid)`, compiled once for each number of steps."""

    @jax.jit
    def loss(params: Any, batch: Batch, times: jax.Array) -> LossSums:
        model = nnx.merge(graph, params)
        return loss_sums(model, batch, plan=model.plan(grid=times, solver=solver))

    return loss


def evaluate(loss: LossFunction, params: Any, batches: Sequence[Batch], config: Config) -> dict[int, MeanLoss]:
    """Returns the held-out loss for each of the config's evaluated step counts, full depth first."""

    grids = {steps: grid.equal(config.model.core, steps) for steps in config.eval_steps}
    # The first call at each count compiles.
    firsts = side_by_side(lambda times: jax.block_until_ready(loss(params, batches[0], times)), grids.values())
    return {
        steps: mean_loss([first, *(loss(params, batch, times) for batch in batches[1:])])
        for (steps, times), first in zip(grids.items(), firsts, strict=True)
    }

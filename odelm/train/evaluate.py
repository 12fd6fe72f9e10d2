"""Held-out loss at several step counts."""

import dataclasses
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
from odelm.data.examples import HeldOutExamples, TaskData
from odelm.data.loader import HeldOutRows, held_out_rows
from odelm.data.scores import TaskScores
from odelm.data.tokens import Prepared
from odelm.models.along_depth import norms_along_depth
from odelm.models.loss import Batch, LossSums, MeanLoss, inputs_of, loss_sums, mean_loss
from odelm.ode import grid
from odelm.train.log import Log

LossFunction = Callable[[Any, Batch, Any], LossSums]


class HeldOut:
    """The held-out batches of a run, the loss on them, and the losses that the run recorded before."""

    def __init__(self, config: Config, graph: nnx.GraphDef, prepared: Prepared | TaskData, mesh: Mesh, log: Log):
        self._config, self._prepared, self._mesh, self._log = config, prepared, mesh, log
        self._graph, self._loss = graph, make_loss(graph)

    def evaluate(self, step: int, params: Any) -> dict[int, float]:
        """Returns the losses after update `step` by number of steps, full depth first, and records them."""
        losses = evaluate(self._loss, params, self._batches, self._config)
        self._record(step, params, losses)
        return {steps: mean.loss for steps, mean in losses.items()}

    def _record(self, step: int, params: Any, losses: dict[int, MeanLoss], scores: TaskScores | None = None) -> None:
        watch = self._config.train.watch
        self._log.evaluation(
            step,
            losses,
            batches=self._config.train.eval_batches,
            documents=self._rows.documents,
            norms=self._norms(params) if watch else None,
            components=self._by_component(params) if watch else None,
            scores=scores,
        )

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

    def _norms(self, params: Any) -> dict[str, list[float]]:
        """Returns the norms of the state and of the field at each unit of full depth, on the first batch."""
        states, fields = self._norms_of(params, self._batches[0])
        return {"state": np.asarray(states).tolist(), "field": np.asarray(fields).tolist()}

    def _by_component(self, params: Any) -> dict[str, float]:
        """Returns the loss at full depth of each component of the corpus, {} if there is only one."""
        if len(self._components) < 2:
            return {}
        times = grid.equal(self._config.model.core, self._config.model.core)
        return {
            name: mean_loss([self._loss(params, batch, times) for batch in batches]).loss
            for name, batches in self._components.items()
        }

    @cached_property
    def _norms_of(self) -> Callable[[Any, Batch], Any]:
        def norms(params: Any, batch: Batch) -> Any:
            return norms_along_depth(nnx.merge(self._graph, params), inputs_of(batch))

        return jax.jit(norms, out_shardings=sharding.replicated(self._mesh))

    @cached_property
    def _components(self) -> dict[str, list[Batch]]:
        """The batches of each component that has tokens to predict, as many for each component as the evaluation has in
        all."""
        found = {}
        assert isinstance(self._prepared, Prepared)
        for name, stream in self._prepared.validation.items():
            if len(stream.tokens) > 1:
                alone = dataclasses.replace(self._prepared, validation={name: stream})
                found[name] = self._placed(held_out_rows(alone, self._config, limit=self._limit))
        return found

    @cached_property
    def _rows(self) -> HeldOutRows | HeldOutExamples:
        assert isinstance(self._prepared, Prepared)
        return held_out_rows(self._prepared, self._config, limit=self._limit)

    @property
    def _limit(self) -> int:
        return self._config.train.eval_batches * self._config.train.batch_size

    @cached_property
    def _batches(self) -> list[Batch]:
        return self._placed(self._rows)

    def _placed(self, held_out: HeldOutRows | HeldOutExamples) -> list[Batch]:
        """Returns the batches of some rows, split over the processes like those of training."""
        share, shares = sharding.batch_share(self._mesh)
        rows = self._config.train.batch_size // shares
        mine = slice(share * rows, (share + 1) * rows)
        batches = held_out.batches(self._config.train.batch_size)
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
    # With several processes, one program at a time: programs in flight that wait for other processes could deadlock.
    ready = jax.device_get if jax.process_count() > 1 else lambda sums: sums
    return {
        steps: mean_loss([first, *(ready(loss(params, batch, times)) for batch in batches[1:])])
        for (steps, times), first in zip(grids.items(), firsts, strict=True)
    }

"""Held-out loss at several step counts."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import nnx

from odelm.config import Config
from odelm.models.loss import Batch, LossSums, loss_sums
from odelm.ode import grid

LossFunction = Callable[[Any, Batch, jax.Array], LossSums]


def make_loss(graph: nnx.GraphDef, *, solver: str = "euler") -> LossFunction:
    """Returns the jitted `loss(params, batch, grid)`, compiled once for each number of steps."""

    @jax.jit
    def loss(params: Any, batch: Batch, times: jax.Array) -> LossSums:
        model = nnx.merge(graph, params)
        return loss_sums(model, batch, plan=model.plan(grid=times, solver=solver))

    return loss


def mean_loss(loss: LossFunction, params: Any, batches: Iterable[Batch], times: Any) -> float:
    """Returns nats a predicted token over all batches, each token weighing the same."""
    sums = [loss(params, batch, times) for batch in batches]
    return float(sum(float(s.nats) for s in sums) / sum(float(s.tokens) for s in sums))


def evaluate(loss: LossFunction, params: Any, batches: Sequence[Batch], config: Config) -> dict[int, float]:
    """Returns the held-out loss for each of the config's evaluated step counts, full depth first."""
    return {
        steps: mean_loss(loss, params, batches, grid.equal(config.model.core, steps)) for steps in config.eval_steps
    }

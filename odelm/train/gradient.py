"""The gradient of a batch: accumulated over parts if asked for, and computed on each device separately where each has
the whole model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from odelm import rng
from odelm.config import Config
from odelm.models.cross_entropy import Teacher
from odelm.models.lm import CausalLM, Classifier, MaskedLM
from odelm.models.loss import Batch, inputs_of, loss_sums, readout_of
from odelm.models.transformer import Grid
from odelm.train.teacher import FrozenModel

Gradient = Callable[[Any, Batch, Grid, jax.Array, FrozenModel | None], tuple[Any, jax.Array]]


def make_gradient(config: Config, graph: nnx.GraphDef) -> Gradient:
    """Returns `gradient(params, batch, grid, step, teacher) -> (gradients, loss)`, pure; dropout's key comes from the
    step."""

    def gradient(
        params: Any, batch: Batch, grid: Grid, step: jax.Array, teacher: FrozenModel | None
    ) -> tuple[Any, jax.Array]:
        mesh = jax.sharding.get_abstract_mesh()
        if not _whole_on_each(mesh) or config.model.dropout:
            key = rng.key(config.train.seed, "dropout", step) if config.model.dropout else None
            return _gradient(config, graph, params, batch, grid, step, teacher, key, lambda local: local)

        def on_one(
            params: Any, rows: Batch, grid: jax.Array, step: jax.Array, teacher: FrozenModel | None
        ) -> tuple[Any, jax.Array]:
            summed = partial(jax.lax.psum, axis_name="data")
            return _gradient(config, graph, params, rows, grid, step, teacher, None, summed)

        # By default the compiler sums the gradient of a shared block over the devices at each of its uses, in the 16
        # bits of its products. Here it is summed on the device first, and over the devices once, in float32.
        whole, rows = PartitionSpec(), PartitionSpec("data")
        return jax.shard_map(
            on_one, mesh=mesh, in_specs=(whole, rows, whole, whole, whole), out_specs=whole, check_vma=False
        )(params, dict(batch), jnp.asarray(grid), jnp.asarray(step), teacher)  # fmt: skip

    return gradient


def _whole_on_each(mesh: AbstractMesh) -> bool:
    """Returns whether several devices share the batch and each has all parameters."""
    return not mesh.empty and mesh.shape.get("data", 1) == mesh.size > 1


def _gradient(
    config: Config,
    graph: nnx.GraphDef,
    params: Any,
    batch: Batch,
    grid: Grid,
    step: jax.Array,
    teacher: FrozenModel | None,
    key: jax.Array | None,
    over_devices: Callable[[Any], Any],
) -> tuple[Any, jax.Array]:
    """Returns the gradient of the objective and the loss; `over_devices` sums over devices what each one has computed
    from its rows."""
    batch = {name: jnp.asarray(rows) for name, rows in batch.items()}
    zero = jnp.zeros(())
    orders = batch["order_weights"].sum() if "order_weights" in batch else zero
    tokens, orders = over_devices((batch["weights"].sum(), orders))

    def share(params: Any, part: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        plan = model.plan(grid=grid, unroll=config.train.unroll, remat=config.train.remat)
        if teacher is None:
            taught = _own_teaching(config, graph, params, part, steps=len(grid) - 1, step=step)
        else:
            taught = _teaching(config, teacher.model, part, step)
        sums = loss_sums(model, part, plan=plan, key=key, z_loss=config.train.z_loss, taught_by=taught)
        return sums.share(tokens, orders), sums.nats

    def add(sums: tuple[Any, jax.Array], numbered: tuple[jax.Array, Batch]) -> tuple[tuple[Any, jax.Array], None]:
        i, part = numbered
        own = None if key is None else jax.random.fold_in(key, i)
        return jax.tree.map(jnp.add, sums, jax.grad(share, has_aux=True)(params, part, own)), None

    parts = config.train.accumulate
    if parts == 1:
        found = jax.grad(share, has_aux=True)(params, batch, key)
    else:
        numbered = jnp.arange(parts), {name: _cut(rows, parts) for name, rows in batch.items()}
        found, _ = jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, params), zero), numbered)
    gradients, nats = over_devices(found)
    return gradients, nats / jnp.maximum(tokens, 1)


def _own_teaching(
    config: Config, graph: nnx.GraphDef, params: Any, batch: Batch, *, steps: int, step: jax.Array
) -> Teacher | None:
    """Returns the model's own states on a batch at full depth, as the teacher of an update of fewer steps; None if not
    asked for or at full depth."""
    if not config.train.distill or steps == config.model.core:
        return None
    model: CausalLM | MaskedLM | Classifier = nnx.merge(graph, jax.lax.stop_gradient(params))
    return Teacher(*_states(config, model, batch, step))


def _teaching(config: Config, model: CausalLM | MaskedLM, batch: Batch, step: jax.Array) -> Teacher:
    """Returns another model's states on a batch at its full depth, with its own readout, as the teacher."""
    hidden, share = _states(config, model, batch, step)
    x, matrix, bias = readout_of(model, hidden, batch)
    return Teacher(x, share, matrix, bias)


def _states(
    config: Config, model: CausalLM | MaskedLM | Classifier, batch: Batch, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns a teaching model's states (B, L, D) at full depth, and its share of what is learned; before
    `distill_from` the states are not computed, and the share is 0."""
    inputs, plan = inputs_of(batch), model.plan(unroll=config.train.unroll)
    shape = jax.eval_shape(lambda: model.run(inputs, plan)[0])
    begun = step >= round(config.train.distill_from * config.train.updates)
    hidden = jax.lax.cond(begun, lambda: model.run(inputs, plan)[0], lambda: jnp.zeros(shape.shape, shape.dtype))
    return hidden, jnp.where(begun, config.train.distill, 0.0)


def _cut(rows: jax.Array, parts: int) -> jax.Array:
    """Returns rows (B, ..) as (parts, B / parts, ..), each part with an equal share of every device's rows."""
    return jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)

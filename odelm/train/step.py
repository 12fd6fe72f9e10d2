"""The training state and the one update, a pure function jitted once for each number of depth steps."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from odelm import rng, sharding
from odelm.compiling import side_by_side
from odelm.config import Config
from odelm.models import create
from odelm.models.loss import Batch, real_tokens
from odelm.models.transformer import Grid
from odelm.train.gradient import make_gradient
from odelm.train.teacher import FrozenModel

Metrics = dict[str, jax.Array]
ON_GPU: dict[str, str | bool] = {"xla_gpu_enable_cublaslt": True, "xla_gpu_enable_triton_gemm": False}
"""How XLA compiles an update for a GPU."""
Update = Callable[["TrainState", Batch, Grid], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """A training run between two updates."""

    step: jax.Array
    """int32 (), the number of updates applied."""
    params: Any
    optimizer: optax.OptState
    skipped: jax.Array
    """int32 (), how many of the last updates in a row were skipped because they were not finite."""
    average: Any = None
    """The running mean of the parameters, None if the config asks for none."""
    teacher: FrozenModel | None = None
    """The model of `train.teacher`; no update changes it, and no checkpoint stores it."""

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated."""
        return self.params if self.average is None else self.average


def graph_of(config: Config) -> tuple[nnx.GraphDef, Any]:
    """Returns the model's structure and its parameters as shapes, without computing any."""
    model = nnx.eval_shape(lambda: create(config.model, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param)


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the state before the first update, made directly in its shardings."""
    init = _init(config, optimizer)
    return jax.jit(init, out_shardings=sharding.state_shardings(jax.eval_shape(init), mesh))()


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the shapes of what `init_state` returns, with their shardings."""
    shapes = jax.eval_shape(_init(config, optimizer))
    return jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
        shapes,
        sharding.state_shardings(shapes, mesh),
    )


def _init(config: Config, optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    def init() -> TrainState:
        model = create(config.model, rngs=nnx.Rngs(rng.key(config.train.seed, "init")))
        params = nnx.state(model, nnx.Param)
        # A copy: the state is donated, and no array may be donated twice.
        average = jax.tree.map(jnp.copy, params) if config.optimizer.average else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0), average)

    return init


def with_params(state: TrainState, params: Any) -> TrainState:
    """Returns the state before the first update with other parameters, copied to where its own are."""
    placed = jax.tree.map(lambda new, old: jax.device_put(np.asarray(new), old.sharding), params, state.params)
    average = None if state.average is None else jax.tree.map(jnp.copy, placed)
    return dataclasses.replace(state, params=placed, average=average)


def make_update(config: Config, graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Update:
    """Returns `update(state, batch, grid) -> (state, metrics)`, pure; dropout's key comes from the step.

    An update whose loss, gradients or parameters are not finite is skipped: it counts as a step, and changes nothing
    else. Metrics are the loss, the norms of the gradients, of the parameters' change and of the parameters, how many
    updates in a row were `skipped`, and the `tokens` of the batch without padding.
    """

    gradient = make_gradient(config, graph)

    def averaged(state: TrainState, params: Any) -> Any:
        if state.average is None:
            return None
        n = state.step.astype(jnp.float32) + 1
        decay = jnp.minimum(config.optimizer.average, (1 + n) / (10 + n))
        return jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, state.average, params)

    def update(state: TrainState, batch: Batch, grid: Grid) -> tuple[TrainState, Metrics]:
        gradients, loss = gradient(state.params, batch, grid, state.step, state.teacher)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = {"gradient_norm": gradients, "update_norm": updates, "parameter_norm": params}
        metrics = {"loss": loss} | {name: optax.tree.norm(tree) for name, tree in norms.items()}
        finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
        params, optimizer_state, average = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, optimizer_state, averaged(state, params)),
            (state.params, state.optimizer, state.average),
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        after = TrainState(state.step + 1, params, optimizer_state, skipped, average, state.teacher)
        return after, metrics | {"skipped": skipped, "tokens": real_tokens(batch)}

    return update


def compile_updates(
    update: Update,
    state: TrainState,
    batch: Batch,
    counts: tuple[int, ...],
    mesh: Mesh,
    announce: Callable[[str], None],
) -> dict[int, Update]:
    """Compiles one executable for each number of depth steps, ahead of the first update; donates the state."""
    jitted = jit_update(update, state, mesh)
    if not counts:
        return {}
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = [jitted.lower(state, batch, jax.ShapeDtypeStruct((n + 1,), jnp.float32)) for n in counts]
    compiled = dict(zip(counts, side_by_side(_compile, lowered, runs=False), strict=True))
    numbers = ", ".join(map(str, counts))
    announce(f"compiled the updates of {numbers} depth steps in {time.perf_counter() - start:.1f} s")
    return compiled


def jit_update(update: Update, state: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """Returns the jitted update, which donates the state; of `state` only the shardings are used."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    whole = sharding.replicated(mesh)
    return jax.jit(
        update,
        in_shardings=(shardings, sharding.batch_sharding(mesh), whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles an update; on a GPU with cuBLASLt for all products, which applies an activation as it writes the
    result."""
    return lowered.compile(ON_GPU if jax.default_backend() == "gpu" else None)

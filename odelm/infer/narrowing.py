"""Early exits by row, batched: all rows are at the same step, and as rows reach the end the batch gets narrower.

The batch is divided into parts. When the remaining rows fit into fewer parts, they are gathered, and the next steps
evaluate the block only for these parts. So a step takes the time of the remaining rows, up to a part of the batch.

A GPU waits for its host whenever the host reads how many rows are left: once a step, and once for each width. The first
three steps are taken without this check, since no row can reach the end before the third.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from odelm import ode
from odelm.errors import InputError
from odelm.infer import on_gpu
from odelm.models.arrays import check_auto
from odelm.models.early_exit import FEWEST_STEPS, EarlyExit, Leaving, Walk, check_exits, start_walk
from odelm.models.field import BlockField
from odelm.models.inputs import Inputs
from odelm.models.transformer import DepthPlan, SharedTransformer
from odelm.models.view import of_rows, see


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Crossing:
    """W rows of a batch of B on their way across one stretch of the depth."""

    step: jax.Array
    """int32 (), how many steps these rows have taken."""
    rows: jax.Array
    """int32 (W,), which row of the batch each is."""
    states: jax.Array
    """(W, L, ..)."""
    walk: Walk
    ends: jax.Array
    """(B, L, ..), the states of the other rows, which have reached the end."""
    evaluations: jax.Array
    """int32 (B,), how many evaluations each of the other rows took."""


PARTS = 4
"""How many parts a batch is divided into: more parts save more evaluations, but each adds a loop to compile and wait
for."""


def encode_narrowing(
    model: SharedTransformer, inputs: Inputs, plan: DepthPlan, rule: EarlyExit, *, parts: int = PARTS
) -> tuple[jax.Array, jax.Array]:
    """Returns the same as `odelm.models.exit_pass.encode_with_exits` by row: hidden states (B, L, D) and the
    evaluations of each row, int32 (B,). The batch gets narrower in steps of one of its `parts`, at most as many as its
    rows.

    Raises InputError for arguments that `encode_with_exits` rejects, and for fewer than one part.
    """
    check_exits(model, plan, rule)
    inputs = inputs.checked(model.config)
    B, real = inputs.shape[0], inputs.real
    if parts < 1:
        raise InputError(f"parts is {parts}, expected 1 or more")
    inputs, view, _ = see(inputs, model.config, None)
    h, evaluations = model._start(inputs, None), jnp.zeros(B, jnp.int32)
    check_auto(h, "early exits")
    for number, (field, part, core) in enumerate(zip(model._fields(view), plan, model._is_core(), strict=True)):
        h = model._into_lanes(h, number)
        if core:
            h, count = _cross(model, field, part, rule, h, real, min(parts, B))
            evaluations = evaluations + count
        else:
            h, _ = ode.follow(field, h, part)
            evaluations = evaluations + part.evaluations
        h = model._out_of_lanes(h, number)
    return model._end(h), evaluations


def make_leaving(graph: nnx.GraphDef) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns the jitted `forward(params, plan, rule, tokens) -> (logits, evaluations)`, float32 (B, L, V) and int32
    (B,), of rows that leave the steps of a plan early."""

    def forward(params: Any, plan: DepthPlan, rule: EarlyExit, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model, ready = on_gpu.ready_to_read(nnx.merge(graph, params), plan, tokens.size)
        hidden, evaluations = encode_narrowing(model, Inputs(tokens), ready, rule)
        return model.readout(hidden), evaluations

    return on_gpu.BySize(forward, texts=3)


def _cross(
    model: SharedTransformer,
    field: BlockField,
    part: ode.Plan,
    rule: EarlyExit,
    h: jax.Array,
    real: jax.Array | None,
    parts: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the states (B, L, ..) at the end of a stretch, and the evaluations that each row took, int32 (B,)."""
    B, N = len(h), len(part.sizes)
    zeros = jnp.zeros((B, 1), jnp.int32)
    state = Crossing(
        jnp.int32(0), jnp.arange(B, dtype=jnp.int32), h, start_walk(model, rule, h, part, zeros),
        jnp.zeros_like(h), zeros[:, 0],
    )  # fmt: skip

    def step(state: Crossing) -> Crossing:
        view = None if field.view is None else of_rows(field.view, state.rows)
        its_real = None if real is None else real[state.rows]
        leaving = Leaving(dataclasses.replace(field, view=view), model, rule, its_real)
        condition = jax.tree.map(lambda leaf: leaf[state.step, 0], part.conditions)
        states, walk, _ = leaving.step(condition, state.states, part.sizes[state.step], state.walk)
        return dataclasses.replace(state, step=state.step + 1, states=states, walk=walk)

    for _ in range(min(FEWEST_STEPS - 1, N)):
        state = step(state)
    widths = [-(-B * n // parts) for n in range(parts, -1, -1)]
    for width, narrower in pairwise(widths):
        state = _narrowed(state, width)

        def going(state: Crossing, narrower: int = narrower) -> jax.Array:
            return (state.step < N) & ((~state.walk.done).sum() > narrower)

        state = jax.lax.while_loop(going, step, state)
    state = _narrowed(state, 0)
    return state.ends, state.evaluations


def _narrowed(state: Crossing, width: int) -> Crossing:
    """Keeps `width` rows, preferring those that have not reached the end; the states of the others go to `ends`."""
    W = len(state.rows)
    if width == W:
        return state
    order = jnp.argsort(state.walk.done[:, 0], stable=True)
    left, ended = order[:width], order[width:]

    def kept(leaf: jax.Array) -> jax.Array:
        return leaf[left] if leaf.ndim else leaf

    to = state.rows[ended]
    unique: dict[str, Any] = dict(unique_indices=True)
    return Crossing(
        state.step, state.rows[left], state.states[left], jax.tree.map(kept, state.walk),
        state.ends.at[to].set(state.states[ended], **unique),
        state.evaluations.at[to].set(state.walk.evaluations[ended, 0], **unique),
    )  # fmt: skip

"""Early exits by row, batched: a fixed number of slots, and a row that has reached the end makes room for the next.

Each slot holds one row at its own depth time, and every step evaluates the block once for all slots, with the condition
of each slot's time. So the time is that of the evaluations that were made, and not that of the slowest row.

A GPU waits for its host whenever that asks it whether to go on. There it is asked after every few steps, those past the
end for nothing, and slots are filled again in every step, whether rows have ended or not.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from odelm import ode
from odelm.errors import InputError
from odelm.models.arrays import check_auto
from odelm.models.early_exit import EarlyExit, Leaving, Walk, check_exits, start_walk
from odelm.models.field import BlockField
from odelm.models.inputs import Inputs
from odelm.models.transformer import DepthPlan, SharedTransformer
from odelm.models.view import of_row, see


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """M slots with rows of a batch of B on their way across one stretch of the depth."""

    rows: jax.Array
    """int32 (M,), the row of the batch that each holds; B is none."""
    steps: jax.Array
    """int32 (M,), how many steps it has taken."""
    states: jax.Array
    """(M, L, ..)."""
    walks: Walk
    """Each leaf with a leading axis (M)."""
    following: jax.Array
    """int32 (), the first row that no slot has held."""
    ends: jax.Array
    """(B, L, ..), the states of the rows that have reached the end."""
    evaluations: jax.Array
    """int32 (B,), how many each took."""


ASKED_AFTER = 4
"""Steps on a GPU between questions whether a row is left."""


def slots_for(batch: int) -> int:
    """Returns how many slots rows of a batch take turns in: a quarter, so that few are empty at the end; on a GPU,
    which computes few rows in the time of more, half."""
    return max(batch // (2 if jax.default_backend() == "gpu" else 4), 1)


def encode_in_slots(
    model: SharedTransformer, inputs: Inputs, plan: DepthPlan, rule: EarlyExit, *, slots: int
) -> tuple[jax.Array, jax.Array]:
    """Returns what `odelm.models.exit_pass.encode_with_exits` does by row, hidden states (B, L, D) and the evaluations
    of each row, int32 (B,), with so many rows at a time in the core.

    Raises InputError for what `encode_with_exits` refuses, and for no slots.
    """
    check_exits(model, plan, rule)
    if slots < 1:
        raise InputError(f"slots is {slots}, expected 1 or more")
    inputs = inputs.checked(model.config)
    real = inputs.real
    inputs, view, _ = see(inputs, model.config, None)
    h, evaluations = model._start(inputs, None), jnp.zeros(inputs.shape[0], jnp.int32)
    check_auto(h, "early exits")
    for number, (field, part, core) in enumerate(zip(model._fields(view), plan, model._is_core(), strict=True)):
        h = model._into_lanes(h, number)
        if core:
            h, count = _cross(model, field, part, rule, h, real, min(slots, len(h)))
            evaluations = evaluations + count
        else:
            h, _ = ode.follow(field, h, part)
            evaluations = evaluations + part.evaluations
        h = model._out_of_lanes(h, number)
    return model._end(h), evaluations


def make_leaving(graph: nnx.GraphDef) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns the jitted `forward(params, plan, rule, tokens) -> (logits, evaluations)`, float32 (B, L, V) and int32
    (B,), of rows that leave the steps of a plan early, `slots_for` of them at a time."""

    @jax.jit
    def forward(params: Any, plan: DepthPlan, rule: EarlyExit, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        hidden, evaluations = encode_in_slots(model, Inputs(tokens), plan, rule, slots=slots_for(len(tokens)))
        return model.readout(hidden), evaluations

    return forward


def _cross(
    model: SharedTransformer,
    field: BlockField,
    part: ode.Plan,
    rule: EarlyExit,
    h: jax.Array,
    real: jax.Array | None,
    slots: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the states (B, L, ..) at the end of a stretch, and the evaluations that each took, int32 (B,)."""
    B, N, on_gpu = len(h), len(part.sizes), jax.default_backend() == "gpu"
    first = start_walk(model, rule, h[:1], part, jnp.zeros((1, 1), jnp.int32))
    firsts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (slots, *leaf.shape)), first)

    def one(condition: Any, h: jax.Array, dt: jax.Array, walk: Walk, row: jax.Array) -> tuple[jax.Array, Walk]:
        seen = None if field.view is None else of_row(field.view, row)
        its_real = None if real is None else real[row][None]
        leaving = Leaving(dataclasses.replace(field, view=seen), model, rule, its_real)
        after, walk, _ = leaving.step(condition, h[None], dt, walk)
        return after[0], walk

    def step(state: Slots) -> Slots:
        place = jnp.minimum(state.steps, N - 1)
        conditions = jax.tree.map(lambda leaf: leaf[place, 0], part.conditions)
        row = jnp.minimum(state.rows, B - 1)
        states, walks = jax.vmap(one)(conditions, state.states, part.sizes[place], state.walks, row)
        state = dataclasses.replace(state, steps=state.steps + 1, states=states, walks=walks)
        ended = (walks.done[:, 0, 0] | (state.steps >= N)) & (state.rows < B)
        if on_gpu:
            return _refilled(state, ended, h, firsts)
        return jax.lax.cond(ended.any(), lambda: _refilled(state, ended, h, firsts), lambda: state)

    def steps(state: Slots) -> Slots:
        if not on_gpu:
            return step(state)
        # Unrolled, because a loop would copy the states in each of its steps.
        return jax.lax.fori_loop(0, ASKED_AFTER, lambda _, state: step(state), state, unroll=True)

    numbers = jnp.arange(slots, dtype=jnp.int32)
    state = Slots(
        numbers, jnp.zeros_like(numbers), h[:slots], firsts, jnp.int32(slots),
        jnp.zeros_like(h), jnp.zeros(B, jnp.int32),
    )  # fmt: skip
    state = jax.lax.while_loop(lambda state: (state.rows < B).any(), steps, state)
    return state.ends, state.evaluations


def _refilled(state: Slots, ended: jax.Array, h: jax.Array, firsts: Walk) -> Slots:
    """Returns the slots with the rows that have `ended`, bool (M,), put aside and the next ones of `h` in their place,
    whose walks begin as `firsts`."""
    B = len(h)
    # Slots whose row has not ended write past the end, which is skipped. If they all wrote to one place, a GPU would do
    # so one after the other.
    at = jnp.where(ended, state.rows, B + jnp.arange(len(ended), dtype=jnp.int32))
    scatter: dict[str, Any] = dict(mode="drop", unique_indices=True)
    following = state.following + jnp.cumsum(ended, dtype=jnp.int32) - 1
    rows = jnp.where(ended, jnp.minimum(following, B), state.rows)

    def renewed(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(ended.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return Slots(
        rows,
        jnp.where(ended, 0, state.steps),
        renewed(h[jnp.minimum(rows, B - 1)], state.states),
        dataclasses.replace(jax.tree.map(renewed, firsts, state.walks), previous=state.walks.previous),
        state.following + ended.sum(dtype=jnp.int32),
        state.ends.at[at].set(state.states, **scatter),
        state.evaluations.at[at].set(state.walks.evaluations[:, 0, 0], **scatter),
    )

"""A pass over the depth with early exits: all rows, or tokens, step together, until all have reached the end.

A row or token that is done keeps its state while others continue, and at the times that it skipped its keys and values
are the last ones that it computed. So there are as many steps as the slowest takes; `odelm.infer.narrowing` removes
rows that are done.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from odelm import ode
from odelm.errors import InputError, nearest
from odelm.models.arrays import check_auto
from odelm.models.early_exit import EarlyExit, Leaving, Walk, check_exits, start_walk
from odelm.models.inputs import Inputs
from odelm.models.memory import Array, KeysAndSlot, KeyValues, Memory, Slot
from odelm.models.precision import compute_dtype
from odelm.models.transformer import DepthPlan, SharedTransformer
from odelm.models.view import View, see

UNITS = ("row", "token")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeldSlot:
    """The newest keys and values (B, L, J, K), to which tokens that are `done`, bool (B, L), add nothing."""

    keys: jax.Array
    values: jax.Array
    done: jax.Array

    def exchanged(self, keys: jax.Array, values: jax.Array, start: Any, *, alone: bool) -> KeysAndSlot:
        """Returns the keys and values, replaced by the new ones for tokens that are not done, and the slot with
        them."""
        held = self.done[..., None, None]
        keys = jnp.where(held, self.keys, keys.astype(self.keys.dtype))
        values = jnp.where(held, self.values, values.astype(self.values.dtype))
        return keys, values, HeldSlot(keys, values, self.done)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FillingSlot(Slot):
    """A slot of a memory that writes its new keys and values, of one token a row, to all later steps too, until those
    steps write their own; rows that are `done`, bool (B, 1), write none."""

    done: jax.Array

    def _written(self, array: jax.Array, new: jax.Array, start: Array) -> jax.Array:
        """Returns the memory (N, R, B, S, J, K) with `new` (B, 1, J, K) at place `start`, int32 () or (B,)."""
        later = jnp.arange(array.shape[0], dtype=jnp.int32) >= self.step
        writes = later[:, None, None, None] & ~self.done[None, :, 0, None, None]
        rows = jnp.arange(array.shape[2], dtype=jnp.int32)
        places = jnp.broadcast_to(jnp.asarray(start, jnp.int32), rows.shape)
        old = array[:, self.stage, rows, places]
        return array.at[:, self.stage, rows, places].set(jnp.where(writes, new[None, :, 0].astype(array.dtype), old))


def encode_with_exits(
    model: SharedTransformer,
    inputs: Inputs,
    plan: DepthPlan,
    rule: EarlyExit,
    *,
    by: str = "row",
    fine: jax.Array | np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns hidden states (B, L, D), and the block evaluations of each row, int32 (B,), or of each token (B, L).

    With `by` "row" a row leaves the fine steps as a whole, with "token" each token does separately: later tokens and
    steps then read the last keys and values that it computed.

    Args:
        plan: a plan of Euler's method, whose steps are taken where nothing settles.
        fine: bool (B, L), tokens that may not leave the fine steps; None is none. Only with `by` "token".

    Raises InputError for a plan of another method, and for a rule on predictions that the model does not make.
    """
    if by not in UNITS:
        raise InputError(f"early exits are by {by!r}; {nearest(by, UNITS)}")
    if fine is not None and by == "row":
        raise InputError("fine marks tokens, but rows leave as a whole: give by='token', or leave it out")
    check_exits(model, plan, rule)
    inputs = inputs.checked(model.config)
    real = inputs.real
    inputs, view, _ = see(inputs, model.config, None)
    tokens = by == "token"
    kept = tuple(_no_keys(model, inputs.shape) if tokens and core else None for core in model._is_core())
    if tokens:
        keys = jnp.ones(inputs.shape, bool) if real is None else real
        view = dataclasses.replace(view or View(), real=keys, lengths=None, start=np.int32(0))
    evaluations = jnp.zeros((inputs.shape[0], inputs.shape[1] if tokens else 1), jnp.int32)
    fine = None if fine is None else jnp.asarray(fine, bool)
    hidden, evaluations, _ = _run(model, inputs, view, plan, rule, evaluations, kept, real, fine)
    return hidden, evaluations if tokens else evaluations[:, 0]


def decode_with_exits(
    model: SharedTransformer,
    inputs: Inputs,
    plan: DepthPlan,
    rule: EarlyExit,
    memory: Memory,
    done: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Memory]:
    """Returns what `model.run` does for one new token of each row, which leaves the fine steps once it has settled: the
    hidden states (B, 1, D), the evaluations of each, int32 (B,), and the memory.

    Rows that are `done`, bool (B,), write no keys and delay no other row. Raises InputError for what `model.run`
    rejects, and for several tokens of a row.
    """
    check_exits(model, plan, rule)
    inputs = inputs.checked(model.config)
    if inputs.shape[1] != 1:
        raise InputError(f"{inputs.shape[1]} tokens of each row are given, expected one: each leaves by itself")
    model._check_memory(inputs, plan, memory)
    inputs, view, after = see(inputs, model.config, memory)
    assert after is not None
    evaluations = jnp.zeros((inputs.shape[0], 1), jnp.int32)
    done = None if done is None else done[:, None]
    hidden, evaluations, blocks = _run(model, inputs, view, plan, rule, evaluations, memory.blocks, None, None, done)
    return hidden, evaluations[:, 0], dataclasses.replace(after, blocks=blocks)


def _run(
    model: SharedTransformer,
    inputs: Inputs,
    view: View | None,
    plan: DepthPlan,
    rule: EarlyExit,
    evaluations: jax.Array,
    kept: tuple[Any, ...],
    real: jax.Array | None,
    fine: jax.Array | None,
    done: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, tuple[Any, ...]]:
    h, after = model._start(inputs, None), []
    check_auto(h, "early exits")
    parts = zip(model._fields(view), plan, kept, model._is_core(), strict=True)
    for number, (field, part, part_kept, core) in enumerate(parts):
        h = model._into_lanes(h, number)
        if core:
            walk = start_walk(model, rule, h, part, evaluations)
            walk = walk if done is None else dataclasses.replace(walk, done=done)
            h, walk, part_kept = _cross(Leaving(field, model, rule, real, fine), h, part, walk, part_kept)
            evaluations = walk.evaluations
        else:
            h, part_kept = ode.follow(field, h, part, part_kept)
            evaluations = evaluations + part.evaluations
        h = model._out_of_lanes(h, number)
        after.append(part_kept)
    return model._end(h), evaluations, tuple(after)


def _cross(leaving: Leaving, h: jax.Array, part: ode.Plan, walk: Walk, kept: Any) -> tuple[jax.Array, Walk, Any]:
    """Returns the state at the end of a stretch, the walk that led there, and the keys and values."""

    def going(carry: tuple[jax.Array, jax.Array, Walk, Any]) -> jax.Array:
        number, _, walk, _ = carry
        return (number < len(part.sizes)) & ~walk.done.all()

    def step(carry: tuple[jax.Array, jax.Array, Walk, Any]) -> tuple[jax.Array, jax.Array, Walk, Any]:
        number, h, walk, kept = carry
        condition = jax.tree.map(lambda leaf: leaf[number, 0], part.conditions)
        slots = _slots(kept, number, walk.done)
        h, walk, slots = leaving.step(condition, h, part.sizes[number], walk, slots)
        return number + 1, h, walk, _kept(slots)

    return jax.lax.while_loop(going, step, (jnp.int32(0), h, walk, kept))[1:]


def _slots(kept: Any, step: jax.Array, done: jax.Array) -> Any:
    """Returns the slots of the keys and values for one evaluation."""

    def slot(one: KeyValues | HeldSlot) -> Slot | HeldSlot:
        if isinstance(one, HeldSlot):
            return dataclasses.replace(one, done=done)
        return FillingSlot(one, step, 0, done)

    return jax.tree.map(slot, kept, is_leaf=lambda x: isinstance(x, KeyValues | HeldSlot))


def _kept(slots: Any) -> Any:
    """Returns the keys and values that `_slots` was given, as an evaluation updated them."""

    def kept(slot: Slot | HeldSlot) -> KeyValues | HeldSlot:
        return slot.kept if isinstance(slot, Slot) else slot

    return jax.tree.map(kept, slots, is_leaf=lambda x: isinstance(x, Slot | HeldSlot))


def _no_keys(model: SharedTransformer, shape: tuple[int, int]) -> Any:
    """Returns keys and values of tokens (B, L) that have none yet."""
    config = model.config
    zeros = jnp.zeros((*shape, config.key_value_heads, config.head_size), compute_dtype(config))
    kept = HeldSlot(zeros, zeros, jnp.zeros(shape, bool))
    return kept if config.inner_blocks == 1 else (kept,) * config.inner_blocks

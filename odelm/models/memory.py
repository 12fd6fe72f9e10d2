"""The key-value cache: keys and values that attention computed for earlier positions, kept for later ones.

A memory belongs to a plan: for each block it holds the keys and values of each (step, stage), so that later positions
find, at every time of the depth, those that a pass over the whole sequence would have computed there.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.models.arrays import check_auto
from odelm.models.kv_sharing import Sharing
from odelm.models.precision import compute_dtype

Array = jax.Array | np.ndarray | np.integer
KeysAndSlot = tuple[jax.Array, jax.Array, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """The keys and values of all evaluations of a plan, N steps of R stages, with J key-value heads."""

    keys: jax.Array
    """(N, R, B, S, J, K), normalised and rotated by their positions, in the dtype of matrix products."""
    values: jax.Array
    """(N, R, B, S, J, K)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slot:
    """The keys and values of one evaluation, among those of a plan."""

    kept: KeyValues
    step: jax.Array
    stage: int = dataclasses.field(metadata=dict(static=True))

    @property
    def keys(self) -> jax.Array:
        """(B, S, J, K)."""
        return self.kept.keys[self.step, self.stage]

    @property
    def values(self) -> jax.Array:
        """(B, S, J, K)."""
        return self.kept.values[self.step, self.stage]

    def written(self, keys: jax.Array, values: jax.Array, start: Array) -> "Slot":
        """Returns a copy with L new keys and values (B, L, J, K) from place `start` on, int32 () or (B,) by row."""
        kept = KeyValues(self._written(self.kept.keys, keys, start), self._written(self.kept.values, values, start))
        return dataclasses.replace(self, kept=kept)

    def exchanged(self, keys: jax.Array, values: jax.Array, start: Array | None, *, alone: bool) -> KeysAndSlot:
        """Returns the keys and values to attend to, given L new ones (B, L, J, K), and the slot with the new ones
        written.

        With `alone` the new positions see only each other, and no earlier positions. Without a memory, `start` is None.
        """
        assert start is not None
        slot = self.written(keys, values, start)
        return (keys, values, slot) if alone else (slot.keys, slot.values, slot)

    def _written(self, array: jax.Array, new: jax.Array, start: Array) -> jax.Array:
        new, zero = new.astype(array.dtype), jnp.int32(0)
        if start.size == 1:  # a scatter would be slower
            at = (self.step, self.stage, zero, start.reshape(()), zero, zero)
            return jax.lax.dynamic_update_slice(array, new[None, None], at)
        rows, places = places_of(start, new.shape[1])
        return array.at[self.step, self.stage, rows, places].set(new)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedSlot(Slot):
    """A slot that several evaluations share, of which only those that are `fresh`, bool (), write to it."""

    fresh: jax.Array

    def exchanged(self, keys: jax.Array, values: jax.Array, start: Array | None, *, alone: bool) -> KeysAndSlot:
        """Returns the same as `Slot.exchanged`, but with the slot's keys and values in place of those that are not
        fresh."""
        length = keys.shape[1]
        slot = self.written(keys, values, np.int32(0) if start is None else start)
        # With `alone` the positions are the first of a memory.
        return (slot.keys[:, :length], slot.values[:, :length], slot) if alone else (slot.keys, slot.values, slot)

    def _written(self, array: jax.Array, new: jax.Array, start: Array) -> jax.Array:
        length = new.shape[1]
        if start.size == 1:
            old = jax.lax.dynamic_slice_in_dim(array[self.step, self.stage], start.reshape(()), length, axis=1)
        else:
            old = array[(self.step, self.stage, *places_of(start, length))]
        return super()._written(array, jnp.where(self.fresh, new.astype(array.dtype), old), start)


def slots_of(memory: Any, place: tuple[jax.Array, int] | None, sharing: Sharing | None = None) -> Any:
    """Returns the slots of a block's memory for one evaluation; None without a memory."""
    if place is None:
        return None
    step, stage = place

    def slot(kept: KeyValues) -> Slot:
        if sharing is None:
            return Slot(kept, step, stage)
        return SharedSlot(kept, sharing.slots[step], stage, sharing.fresh[step])

    return jax.tree.map(slot, memory, is_leaf=lambda x: isinstance(x, KeyValues))


def kept_in(slots: Any) -> Any:
    """Returns the memory that `slots_of` was given, as an evaluation updated it."""
    return jax.tree.map(lambda slot: slot.kept, slots, is_leaf=lambda x: isinstance(x, Slot))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """Room for S positions of B rows, of which the first `length` are filled.

    A smaller length removes positions: entries after it are not attended to, and are overwritten.

    With a `window` a query sees only that many positions, its own included, and the memory is a ring: a position that
    finds no room takes the place of the oldest. It must have room for the window and for the padding between a row's
    positions.
    """

    blocks: tuple[Any, ...]
    """For each part of a model's plan the keys and values that its evaluations keep: `KeyValues` with leading axes (N,
    R), or for a `BlockChain` a tuple of them."""
    length: Array
    """int32 (), or (B,) where the rows differ."""
    real: jax.Array
    """bool (B, S), True at filled places that may be attended to."""
    segments: jax.Array
    """int32 (B, S)."""
    positions: jax.Array | None = None
    """int32 (B, S), of a ring: the position that is at each place."""
    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def is_empty(self) -> bool:
        """Whether the memory is known to be empty."""
        return not isinstance(self.length, Tracer) and not np.asarray(self.length).any()

    @property
    def room(self) -> int:
        """S."""
        return self.real.shape[1]

    @property
    def next_place(self) -> Array:
        """Where the next position goes, int32 () or (B,)."""
        return self.length if self.window is None else self.length % np.int32(self.room)

    def check_room(self, batch: int, length: int) -> None:
        """Raises InputError if it has no room for `length` more positions of `batch` rows."""
        rows, room = self.real.shape
        if self.window is not None and not self.is_empty and length > 1:
            raise InputError(f"a ring takes one position at a time after its first ones, but {length} are given")
        if rows != batch or length > room:
            raise InputError(
                f"the memory has room for {room} positions of {rows} rows, but {length} of {batch} rows are given: use "
                f"model.memory(plan, batch={batch}, room=...)"
            )
        overflows = not isinstance(self.length, Tracer) and int(self.length.max()) + length > room
        if overflows and self.window is not None and room < self.window:
            raise InputError(
                f"a ring of {room} places is too small for its window of {self.window}: make it with more room"
            )
        if overflows and self.window is None:
            raise InputError(
                f"the memory holds {int(self.length.max())} positions of the {room} that it has room for, and {length} "
                "more are given: make it with more room"
            )

    def widened(self, more: int) -> "Memory":
        """Returns a copy with room for `more` additional positions."""

        def widen(array: jax.Array, axis: int) -> jax.Array:
            return jnp.pad(array, [(0, more if i == axis else 0) for i in range(array.ndim)])

        return dataclasses.replace(
            self,
            blocks=jax.tree.map(lambda leaf: widen(leaf, 3), self.blocks),
            real=widen(self.real, 1),
            segments=widen(self.segments, 1),
            positions=None if self.positions is None else widen(self.positions, 1),
        )

    def part(self, start: jax.Array, count: int) -> "Memory":
        """Returns a memory of only `count` positions, those from `start` (B,) on in each row."""
        assert self.window is None, "a ring's positions need not follow each other"
        rows, places = places_of(start, count)

        def read(leaf: jax.Array) -> jax.Array:
            if start.size == 1:  # a gather would be slower
                return jax.lax.dynamic_slice_in_dim(leaf, start.reshape(()), count, axis=3)
            return leaf[:, :, rows, places]

        blocks = jax.tree.map(read, self.blocks)
        return Memory(blocks, jnp.full_like(start, count), self.real[rows, places], self.segments[rows, places])

    def with_part(self, part: "Memory", start: jax.Array) -> "Memory":
        """Returns a copy with the keys and values of `part` from `start` (B,) on; its length is not changed."""
        assert self.window is None, "a ring's positions need not follow each other"
        rows, places = places_of(start, part.room)

        def write(leaf: jax.Array, new: jax.Array) -> jax.Array:
            if start.size == 1:  # a scatter would be slower
                return jax.lax.dynamic_update_slice_in_dim(leaf, new, start.reshape(()), axis=3)
            return leaf.at[:, :, rows, places].set(new)

        return dataclasses.replace(self, blocks=jax.tree.map(write, self.blocks, part.blocks))


def placed(array: jax.Array, new: jax.Array, start: Array) -> jax.Array:
    """Returns `array` (B, S, ..) with `new` (B, L, ..) in its dtype from place `start` on: int32 (), or (B,) by row."""
    new = new.astype(array.dtype)
    if start.size == 1:  # a scatter would be slower
        return jax.lax.dynamic_update_slice_in_dim(array, new, start.reshape(()), axis=1)
    return array.at[places_of(start, new.shape[1])].set(new)


def places_of(start: Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the rows' indices, int32 (B, 1), and for each row `count` places from its `start` (B,) on, int32 (B,
    L)."""
    start = jnp.asarray(start)
    rows = jnp.arange(len(start), dtype=jnp.int32)[:, None]
    return rows, start[:, None] + jnp.arange(count, dtype=jnp.int32)[None]


def check_memory(config: ModelConfig, room: int, window: int | None) -> None:
    """Raises InputError for a room and a window that a model's memory cannot have."""
    limit = config.max_length
    if room < 1 or (window is None and room > limit):
        most = f"1 to model.max_length, {limit}" if window is None else "1 or more"
        raise InputError(f"room is {room}, expected {most}")
    if window is None:
        return
    if not 0 < window <= limit:
        raise InputError(f"window is {window}, expected 1 to model.max_length, {limit}")
    if config.positions != "rotary":
        raise InputError(f"a window needs rotary positions, but model.positions is {config.positions!r}")


def empty_keys(config: ModelConfig, stages: tuple[int, ...], rows: tuple[int, int]) -> Any:
    """Returns room for keys and values of `rows` (B, S) at each of `stages` (N, R) of one block."""
    zeros = jnp.zeros((*stages, *rows, config.key_value_heads, config.head_size), compute_dtype(config))
    kept = KeyValues(zeros, zeros)
    return kept if config.inner_blocks == 1 else (kept,) * config.inner_blocks


def carried_keys(config: ModelConfig, h: jax.Array) -> Any:
    """Returns room for the newest keys and values of states (B, L, ..), which are carried along the depth."""
    check_auto(h, "keys and values that are shared (model.kv_span)")
    return empty_keys(config, (1, 1), (h.shape[0], h.shape[1]))


def empty_memory(blocks: tuple[Any, ...], rows: tuple[int, int], window: int | None = None) -> Memory:
    """Returns a memory of `rows` (B, S) with nothing in it.

    Its length is a NumPy number, so that traced code that makes a memory knows that it is empty.
    """
    positions = None if window is None else jnp.zeros(rows, jnp.int32)
    return Memory(blocks, np.int32(0), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32), positions, window)

"""Keys and values that attention computed for earlier positions, kept for later ones.

A memory belongs to a plan: block by block it holds what each (step, stage) computed, so that the positions that come
later find, at every time of the depth, what a pass over the whole sequence would have computed there.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """Of one evaluation of one attention, or with leading axes (N, R) of all of a plan."""

    keys: jax.Array
    """(B, S, H, K), normalised and turned by their positions, in the dtype of matrix products."""
    values: jax.Array
    """(B, S, H, K)."""

    def written(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> "KeyValues":
        """Returns a copy with L new keys and values (B, L, H, K) from place `start` on, as `placed` says."""
        return KeyValues(placed(self.keys, keys, start), placed(self.values, values, start))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """Room for S positions of B rows, of which the first `length` are filled.

    Positions are taken back by a smaller length: what stands after it is seen by none, and written over.
    """

    blocks: tuple[Any, ...]
    """For each part of a model's plan what its evaluations keep: `KeyValues` with leading axes (N, R), or for a
    `BlockChain` a tuple of them."""
    length: jax.Array
    """int32 (), or (B,) where the rows differ."""
    real: jax.Array
    """bool (B, S), True at filled places that may be attended to."""
    segments: jax.Array
    """int32 (B, S)."""

    @property
    def room(self) -> int:
        """S."""
        return self.real.shape[1]

    def widened(self, more: int) -> "Memory":
        """Returns a copy with room for so many more positions."""

        def widen(array: jax.Array, axis: int) -> jax.Array:
            return jnp.pad(array, [(0, more if i == axis else 0) for i in range(array.ndim)])

        return dataclasses.replace(
            self,
            blocks=jax.tree.map(lambda leaf: widen(leaf, 3), self.blocks),
            real=widen(self.real, 1),
            segments=widen(self.segments, 1),
        )

    def part(self, start: jax.Array, count: int) -> "Memory":
        """Returns a memory of `count` positions alone, those from `start` (B,) on in each row."""
        rows = partial(jax.lax.dynamic_slice_in_dim, slice_size=count)
        kept = jax.vmap(partial(rows, axis=2), in_axes=(2, 0), out_axes=2)
        alone = jax.vmap(rows)
        return Memory(
            jax.tree.map(lambda leaf: kept(leaf, start), self.blocks),
            jnp.full_like(start, count),
            alone(self.real, start),
            alone(self.segments, start),
        )

    def with_part(self, part: "Memory", start: jax.Array) -> "Memory":
        """Returns a copy with the keys and values of `part` from `start` (B,) on; its length is not changed."""
        write = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=2), in_axes=(2, 2, 0), out_axes=2)
        return dataclasses.replace(
            self, blocks=jax.tree.map(lambda leaf, new: write(leaf, new, start), self.blocks, part.blocks)
        )


def placed(array: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Returns `array` (B, S, ..) with `new` (B, L, ..) in its dtype from place `start` on: int32 (), or (B,) by row."""
    new = new.astype(array.dtype)
    if start.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(array, new, start, axis=1)
    return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(array, new, start)


def empty_key_values(stages: tuple[int, int], rows: tuple[int, int], heads: tuple[int, int], dtype: Any) -> KeyValues:
    """Returns room for `rows` (B, S) and `heads` (H, K) at each of `stages` (N, R)."""
    zeros = jnp.zeros((*stages, *rows, *heads), dtype)
    return KeyValues(zeros, zeros)


def empty_memory(blocks: tuple[Any, ...], rows: tuple[int, int]) -> Memory:
    """Returns a memory of `rows` (B, S) with nothing in it."""
    return Memory(blocks, jnp.int32(0), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32))

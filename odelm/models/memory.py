"""Keys and values that attention computed for earlier positions, kept for later ones.

A memory belongs to a plan: block by block it holds what each (step, stage) computed, so that the positions that come
later find, at every time of the depth, what a pass over the whole sequence would have computed there.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """Of one evaluation of one attention of J key-value heads, or with leading axes (N, R) of all of a plan."""

    keys: jax.Array
    """(B, S, J, K), normalised and turned by their positions, in the dtype of matrix products."""
    values: jax.Array
    """(B, S, J, K)."""

    def written(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> "KeyValues":
        """Returns a copy with L new keys and values (B, L, J, K) from place `start` on."""
        at = (0, start, 0, 0)
        return KeyValues(
            jax.lax.dynamic_update_slice(self.keys, keys.astype(self.keys.dtype), at),
            jax.lax.dynamic_update_slice(self.values, values.astype(self.values.dtype), at),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """Room for S positions of B rows, of which the first `length` are filled."""

    blocks: tuple[Any, ...]
    """For each part of a model's plan what its evaluations keep: `KeyValues` with leading axes (N, R), or for a
    `BlockChain` a tuple of them."""
    length: jax.Array
    """int32 ()."""
    real: jax.Array
    """bool (B, S), True at filled places that may be attended to."""
    segments: jax.Array
    """int32 (B, S)."""

    @property
    def room(self) -> int:
        """S."""
        return self.real.shape[1]


def empty_key_values(stages: tuple[int, int], rows: tuple[int, int], heads: tuple[int, int], dtype: Any) -> KeyValues:
    """Returns room for `rows` (B, S) and `heads` (J, K) at each of `stages` (N, R)."""
    zeros = jnp.zeros((*stages, *rows, *heads), dtype)
    return KeyValues(zeros, zeros)


def empty_memory(blocks: tuple[Any, ...], rows: tuple[int, int]) -> Memory:
    """Returns a memory of `rows` (B, S) with nothing in it."""
    return Memory(blocks, jnp.int32(0), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32))

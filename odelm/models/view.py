"""The view that attention has of the tokens: their positions, and which of them a query may attend to.

It is computed once per call and used at every depth. Padding, causality and documents packed in one row are combined
into one mask, which is also correct where the keys begin with those of a memory, so that there are fewer queries than
keys.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from odelm.config import ModelConfig
from odelm.models.arrays import along_last
from odelm.models.inputs import Inputs, positions_within
from odelm.models.memory import Array, Memory, placed

Angles = tuple[jax.Array, jax.Array]
"""Cosines and sines, float32 (L, K/2) each, or (B, L, K/2) where the positions differ between rows."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """The tokens as attention sees them, B rows of L queries and S keys."""

    angles: Angles | None = None
    """The angles of the queries' rotary positions; None for a model with other positions."""
    real: jax.Array | None = None
    """bool (B, S), True at the keys that may be attended to; None is all."""
    lengths: jax.Array | None = None
    """int32 (B,), given where `real` is known to be this many leading keys of each row."""
    segments: tuple[jax.Array, jax.Array] | None = None
    """int32 (B, L) and (B, S): the documents of queries and keys, each of which sees only itself."""
    start: Array | None = None
    """int32 () or (B,), the index of the first query among the keys of a memory; None is no memory: queries and keys
    have the same positions."""
    positions: tuple[jax.Array, jax.Array] | None = None
    """int32 (B, L) and (B, S), given with a window: the positions of queries and keys."""
    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    """How many positions a query sees, its own included; None is all."""
    first: bool = dataclasses.field(default=False, metadata=dict(static=True))
    """Whether the memory was empty before, so that queries and keys have the same positions too."""

    @property
    def alone(self) -> bool:
        """Whether queries see only keys of the same positions, and none of a memory."""
        return self.start is None or self.first

    def allowed(self, queries: int, *, causal: bool) -> jax.Array | None:
        """Returns which keys each query may attend to, bool (B or 1, 1, L or 1, S); None is all.

        Without a memory causality is left to the implementation of attention, which needs no mask for it.
        """
        parts = []
        if self.real is not None:
            parts.append(self.real[:, None, None, :])
        if self.segments is not None:
            of_queries, of_keys = self.segments
            parts.append(of_queries[:, None, :, None] == of_keys[:, None, None, :])
        if self.positions is not None:
            assert self.window is not None
            of_queries, of_keys = self.positions[0][:, None, :, None], self.positions[1][:, None, None, :]
            parts.append(of_keys > of_queries - self.window)
        if not self.alone and causal and self.window is None:  # in a ring a single query comes after all keys
            assert self.start is not None
            assert self.real is not None, "a memory says which of its keys are there"
            keys = jnp.arange(self.real.shape[1], dtype=jnp.int32)
            parts.append((keys[None, None, :] <= _places(self.start, queries)[:, :, None])[:, None])
        if not parts:
            return None
        allowed = parts[0]
        for part in parts[1:]:
            allowed = allowed & part
        return allowed

    def segment_ids(self, shape: tuple[int, ...]) -> jax.Array | None:
        """Returns the segment of each token, int32 (B, L), in place of `allowed` where there is no memory; None is a
        single segment.

        Padding is a segment of its own: attention's result there differs from the one with a mask, and neither is used.
        """
        if self.real is None and self.segments is None:
            return None
        ids = jnp.zeros(shape, jnp.int32) if self.segments is None else self.segments[0].astype(jnp.int32)
        return ids if self.real is None else jnp.where(jnp.broadcast_to(self.real, shape), ids, -1)


def see(inputs: Inputs, config: ModelConfig, memory: Memory | None) -> tuple[Inputs, View | None, Memory | None]:
    """Returns the inputs, the view that attention has of them, and the memory with their places marked.

    The returned inputs have positions where they are not 0 to L - 1. The view is None if it would be empty.
    """
    positions, lengths, segments = (
        None if array is None else jnp.asarray(array) for array in (inputs.positions, inputs.lengths, inputs.segments)
    )
    if memory is not None:
        return _see_after(inputs, config, memory)
    if positions is None and segments is not None:
        positions = positions_within(segments)
    angles = angles_of(jnp.arange(inputs.shape[1]) if positions is None else positions, config)
    view = View(angles, inputs.real, lengths, None if segments is None else (segments, segments))
    return dataclasses.replace(inputs, positions=positions), view if jax.tree.leaves(view) else None, None


def _see_after(inputs: Inputs, config: ModelConfig, memory: Memory) -> tuple[Inputs, View, Memory]:
    """Returns what `see` does, for positions that come after those of a memory."""
    B, L = inputs.shape
    real = jnp.ones((B, L), bool) if inputs.real is None else inputs.real
    segments = jnp.zeros((B, L), jnp.int32) if inputs.segments is None else jnp.asarray(inputs.segments, jnp.int32)
    after = Memory(
        memory.blocks,
        memory.length + np.int32(L),
        placed(memory.real, real, memory.next_place),
        placed(memory.segments, segments, memory.next_place),
        window=memory.window,
    )
    if inputs.positions is None and memory.window is not None:
        inputs = dataclasses.replace(inputs, positions=jnp.broadcast_to(_places(memory.length, L), (B, L)))
    if inputs.positions is None:
        positions = _positions_after(memory, after, segments, L)
    else:
        positions = jnp.asarray(inputs.positions)
    angles = angles_of(positions, config)
    shown: dict[str, Any] = dict(start=memory.next_place)
    if memory.window is not None:
        assert memory.positions is not None
        after = dataclasses.replace(after, positions=placed(memory.positions, positions, memory.next_place))
        of_keys = positions if memory.is_empty else after.positions
        shown |= dict(positions=(positions, of_keys), window=memory.window)
    if memory.is_empty:
        given = None if inputs.segments is None else (segments, segments)
        lengths = None if inputs.lengths is None else jnp.asarray(inputs.lengths)
        view = View(angles, inputs.real, lengths, given, **shown, first=True)
    else:
        view = View(angles, after.real, None, (segments, after.segments), **shown)
    return dataclasses.replace(inputs, positions=positions), view, after


def _positions_after(memory: Memory, after: Memory, segments: jax.Array, length: int) -> jax.Array:
    """Returns each new token's distance from the first of its segment, which may be in the memory, int32 (B, L)."""
    same = after.segments[:, None, :] == segments[:, :, None]
    filled = (jnp.arange(memory.room)[None] < jnp.asarray(after.length).reshape(-1, 1))[:, None]
    first = jnp.argmax(same & filled, axis=-1).astype(jnp.int32)
    return _places(memory.length, length) - first


def _places(start: Array, count: int) -> jax.Array:
    """Returns `count` places from `start` on, int32 (1, L), or (B, L) where the rows differ."""
    return jnp.asarray(start).reshape(-1, 1) + jnp.arange(count, dtype=jnp.int32)[None]


def rotary_angles(positions: jax.Array, size: int, base: float) -> Angles:
    """Returns the cosines and sines of the rotations at positions (.., L), float32 (.., L, K/2) each, K the `size`.

    Source: Su et al. 2021, arXiv 2104.09864, section 3.2.
    """
    rates = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions[..., None].astype(jnp.float32) * along_last(rates, positions.ndim + 1)
    return jnp.cos(angles), jnp.sin(angles)


def angles_of(positions: jax.Array, config: ModelConfig) -> Angles | None:
    """Returns the angles of positions (.., L) in a model with rotary positions, else None."""
    return rotary_angles(positions, config.head_size, config.rotary_base) if config.positions == "rotary" else None


def of_rows(view: View, rows: jax.Array) -> View:
    """Returns the view of some rows of a batch, int32 (n,)."""

    def its(leaf: jax.Array, axes: int) -> jax.Array:
        return leaf[rows] if leaf.ndim == axes else leaf

    return View(
        None if view.angles is None else (its(view.angles[0], 3), its(view.angles[1], 3)),
        None if view.real is None else its(view.real, 2),
        None if view.lengths is None else its(view.lengths, 1),
        None if view.segments is None else (its(view.segments[0], 2), its(view.segments[1], 2)),
        view.start if view.start is None or jnp.ndim(view.start) == 0 else its(jnp.asarray(view.start), 1),
        None if view.positions is None else (its(view.positions[0], 2), its(view.positions[1], 2)),
        view.window,
        view.first,
    )

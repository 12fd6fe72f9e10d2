"""Several documents in one row: each attends to itself alone, and its positions start at 0."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from odelm.config import ModelConfig
from odelm.models.rotary import Angles, rotary_angles


class Packing(NamedTuple):
    """What a model needs to know of the documents packed in its rows, computed once for all depth steps."""

    segments: jax.Array
    """int32 (B, L), non-decreasing along a row: which of its documents a token is of."""
    positions: jax.Array
    """int32 (B, L), from 0 where a segment starts."""
    angles: Angles | None
    """Of rotary positions, float32 (B, L, K/2) each; None for a model of other ones.

    Attention depends on their differences only, so restarting them matters to rounding alone: a document is then
    rounded the same wherever in its row it stands.
    """

    @classmethod
    def of(cls, segments: jax.Array, config: ModelConfig) -> "Packing":
        """Returns what a model of this config needs of the segments, int32 (B, L)."""
        positions = positions_within(segments)
        if config.positions != "rotary":
            return cls(segments, positions, None)
        cos, sin = rotary_angles(segments.shape[1], config.head_size, config.rotary_base)
        return cls(segments, positions, (cos[positions], sin[positions]))

    def together(self) -> jax.Array:
        """Returns bool (B, 1, L, S), True where query and key are of one document."""
        return self.segments[:, None, :, None] == self.segments[:, None, None, :]


def positions_within(segments: jax.Array) -> jax.Array:
    """Returns how far each token is from the first of its segment, int32 (B, L)."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)

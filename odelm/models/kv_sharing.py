"""Keys and values shared by neighbouring times: a smaller memory.

With `model.kv_span` the depth of each group is cut into spans of that many units. The first evaluation in a span
computes keys and values, and the others in that span attend to them. Coarse steps as long as a span share nothing, and
full depth needs no more memory than such steps. The cost of sharing, in models that were trained with it and without
it, is in docs/inference.md ("Keys and values of neighbouring times"). For the layers of a stack this is cross-layer
attention (Brandon et al. 2024, arXiv 2405.12981); defining spans in time, so that they apply to every grid, is ours.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from odelm import ode
from odelm.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sharing:
    """Which keys and values each of the N evaluations of a stretch reads."""

    slots: jax.Array
    """int32 (N,), the index of its keys and values among those that are kept."""
    fresh: jax.Array
    """bool (N,), whether the evaluation computes them itself."""


def sharing_of(part: ode.Plan, span: int, *, carried: bool = False) -> Sharing:
    """Returns which evaluations share keys and values along a stretch, whose spans are counted from its beginning; if
    they are `carried`, one slot holds the newest of all."""
    times = part.times[:, 0]
    # A time that rounding has put just before the edge of a span belongs to the span that starts at that edge.
    spans = jnp.floor((times - times[0]) / span + 1e-3)
    # No span starts at the end, however near to it the last step is.
    last = jnp.ceil(part.sizes.sum() / span - 1e-3) - 1
    spans = jnp.minimum(spans, last).astype(jnp.int32)
    fresh = jnp.concatenate([jnp.ones(1, bool), spans[1:] != spans[:-1]])
    return Sharing(jnp.zeros_like(spans) if carried else jnp.cumsum(fresh, dtype=jnp.int32) - 1, fresh)


def slot_count(part: ode.Plan, config: ModelConfig) -> int:
    """Returns the number of evaluations for which a memory has room, for a stretch of the core."""
    spans = math.ceil(config.core // config.groups / config.kv_span)
    return min(part.times.shape[0], spans)


def kept_times(part: ode.Plan, config: ModelConfig) -> jax.Array:
    """Returns the times of the keys and values that a memory holds for a stretch of the core, float32 (C, R), in order;
    infinite for slots that the grid does not use."""
    if config.kv_span == 1:
        return part.times
    sharing, numbers = sharing_of(part, config.kv_span), jnp.arange(slot_count(part, config), dtype=jnp.int32)
    first = jnp.searchsorted(sharing.slots, numbers)
    known = (numbers <= sharing.slots[-1])[:, None]
    return jnp.where(known, part.times[jnp.minimum(first, len(part.times) - 1)], jnp.inf)

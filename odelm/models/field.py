"""The block as a vector field over depth time, bound to one call's padding mask, packing and dropout key."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from odelm.models.block import BlockChain, SharedBlock
from odelm.models.packing import Packing

TimedCondition = tuple[Any, jax.Array | None]
"""What the block needs of its time, a `Condition` or a tuple of them, and the key of its dropout."""


@dataclass(frozen=True, eq=False)
class BlockField:
    """`f(t, h)` of one block: an `odelm.ode.ConditionedField`, and post-norm a `ProjectedField`.

    Dropout is a function of `t`: its key is folded with the bits of the time, so that the field stays a
    function of (t, h) and every integration of it sees the same one.
    """

    block: SharedBlock | BlockChain
    mask: jax.Array | None = None
    """bool (B, L), True at real tokens."""
    key: jax.Array | None = None
    packing: Packing | None = None

    def condition(self, t: jax.Array) -> TimedCondition:
        if self.key is None:
            return self.block.condition(t), None
        bits = jax.lax.bitcast_convert_type(t.astype(jnp.float32), jnp.uint32)
        return self.block.condition(t), jax.random.fold_in(self.key, bits)

    def increment(self, condition: TimedCondition, h: jax.Array) -> jax.Array:
        return self.block.increment(condition[0], h, mask=self.mask, packing=self.packing, key=condition[1])

    def project(self, condition: TimedCondition, h: jax.Array, dt: jax.Array) -> jax.Array:
        return self.block.project(condition[0], h, dt, mask=self.mask, packing=self.packing, key=condition[1])

    def __call__(self, t: jax.Array, h: jax.Array) -> jax.Array:
        return self.increment(self.condition(t), h)

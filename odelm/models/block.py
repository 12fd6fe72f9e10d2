"""The shared block: from a state, and what its time says, to the state's increment or its next value.

Pre-norm, the block is a vector field. `a = Attn(N1 h)`, and the increment is `a + MLP(N2(h + a))`, or with
parallel branches `a + MLP(N2 h)`; a step of size `dt` adds `dt` times it.

Post-norm, the block keeps its state normalised, and a step scales the branches *inside* the norms:
`a = N1(h + dt Attn h)`, `h' = N2(a + dt MLP a)`, or with parallel branches `h' = N1(h + dt (Attn h + MLP h))`.
At `dt = 1` that is the block of BERT and ALBERT; at larger steps the norms still return the state to where
the block expects it, which `h + dt (Block(h) - h)` does not beyond `dt = 2`.
"""

from typing import NamedTuple

import jax
from flax import nnx

from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.models.attention import Attention
from odelm.models.feedforward import FeedForward
from odelm.models.modulation import Modulation
from odelm.models.norm import Affine, Norm


class Condition(NamedTuple):
    """All that a block draws from its time: the affine maps of its norms, and (D,) gates on its branches."""

    norm1: Affine
    norm2: Affine | None
    gate1: jax.Array | None
    gate2: jax.Array | None


class SharedBlock(nnx.Module):
    """One Transformer block, to be applied many times. All calls take and return states (B, L, D)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.parallel = config.parallel_branches
        self.post_norm = config.norm_placement == "post"
        self.attention = Attention(config, rngs=rngs)
        self.feedforward = FeedForward(config, rngs=rngs)
        self.norm1 = Norm(config, config.width)
        self.norm2 = None if self.parallel and self.post_norm else Norm(config, config.width)
        self.modulation = (
            Modulation(config, 4 if self.norm2 is None else 6, rngs=rngs) if config.time_modulation else None
        )
        self.dropout = nnx.Dropout(config.dropout)

    def condition(self, t: jax.Array) -> Condition:
        """Returns what the block needs to know of the time `t`, a float32 scalar in [0, depth]."""
        if self.modulation is None:
            return Condition(self.norm1.affine(), self.norm2 and self.norm2.affine(), None, None)
        gate1, gate2, *affine = self.modulation(t)
        norm2 = self.norm2 and self.norm2.affine(*affine[2:])
        return Condition(self.norm1.affine(*affine[:2]), norm2, 1 + gate1, 1 + gate2)

    def increment(
        self, condition: Condition, h: jax.Array, *, mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """Returns the derivative of the state. `mask` is bool (B, L); `key` turns dropout on."""
        if self.post_norm:
            return self.project(condition, h, 1.0, mask=mask, key=key) - h
        key1, key2 = _split(key)
        a = _scaled(self._attend(self.norm1(h, condition.norm1), mask, key1), condition.gate1)
        inner = h if self.parallel else (h + a).astype(h.dtype)
        assert self.norm2 is not None
        return a + _scaled(self._feed(self.norm2(inner, condition.norm2), key2), condition.gate2)

    def project(
        self,
        condition: Condition,
        h: jax.Array,
        dt: jax.Array | float,
        *,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Post-norm only: returns the state after a step of size `dt`, normalised; InputError for a pre-norm block."""
        if not self.post_norm:
            raise InputError("projected_euler is the step of a post-norm block, and this one is pre-norm: try euler")
        key1, key2 = _split(key)
        gate1, gate2 = (dt if gate is None else dt * gate for gate in (condition.gate1, condition.gate2))
        a = h + gate1 * self._attend(h, mask, key1)
        if self.norm2 is None:
            return self.norm1(a + gate2 * self._feed(h, key2), condition.norm1).astype(h.dtype)
        a = self.norm1(a, condition.norm1).astype(h.dtype)
        return self.norm2(a + gate2 * self._feed(a, key2), condition.norm2).astype(h.dtype)

    def __call__(
        self, h: jax.Array, t: jax.Array | float = 0.0, *, mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """Applies the block once, as a layer of an ordinary stack: a step of size 1 from time `t`."""
        condition = self.condition(jax.numpy.float32(t))
        if self.post_norm:
            return self.project(condition, h, 1.0, mask=mask, key=key)
        return (h + self.increment(condition, h, mask=mask, key=key)).astype(h.dtype)

    def _attend(self, x: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        return self.dropout(self.attention(x, mask), deterministic=key is None, rngs=key)

    def _feed(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return self.dropout(self.feedforward(x), deterministic=key is None, rngs=key)


def _scaled(x: jax.Array, gate: jax.Array | None) -> jax.Array:
    return x if gate is None else x * gate.astype(x.dtype)


def _split(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    if key is None:
        return None, None
    first, second = jax.random.split(key)
    return first, second

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
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.models.attention import Attention
from odelm.models.feedforward import FeedForward
from odelm.models.modulation import Modulation
from odelm.models.norm import Affine, Norm
from odelm.models.packing import Packing
from odelm.models.residual import LayerResidual, Residual


class Condition(NamedTuple):
    """All that a block draws from its time: the affine maps of its norms, and (D,) gates on its branches."""

    norm1: Affine
    norm2: Affine | None
    gate1: jax.Array | None
    gate2: jax.Array | None
    residual: Residual | None = None


class SharedBlock(nnx.Module):
    """One Transformer block, to be applied many times. All calls take and return states (B, L, D).

    `start` is where its stretch of depth time begins: 0, but for the later ones of several groups.
    """

    def __init__(self, config: ModelConfig, *, start: float = 0.0, rngs: nnx.Rngs):
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
        self.residual = (
            LayerResidual(config, start=start, two_norms=self.norm2 is not None, rngs=rngs)
            if config.layer_rank
            else None
        )
        self.dropout = nnx.Dropout(config.dropout)

    def condition(self, t: jax.Array) -> Condition:
        """Returns what the block needs to know of the time `t`, a float32 scalar in [0, depth]."""
        residual = None if self.residual is None else self.residual(t)
        own1, own2 = (None, None) if residual is None else (residual.norm1, residual.norm2)
        if self.modulation is None:
            norm2 = self.norm2 and self.norm2.affine(own=own2)
            return Condition(self.norm1.affine(own=own1), norm2, None, None, residual)
        gate1, gate2, *affine = self.modulation(t)
        norm2 = self.norm2 and self.norm2.affine(*affine[2:], own=own2)
        return Condition(self.norm1.affine(*affine[:2], own=own1), norm2, 1 + gate1, 1 + gate2, residual)

    def increment(
        self,
        condition: Condition,
        h: jax.Array,
        *,
        mask: jax.Array | None = None,
        packing: Packing | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the derivative of the state.

        `mask` is bool (B, L), True at real tokens; `packing` tells documents of one row apart; `key` turns dropout on.
        """
        if self.post_norm:
            return self.project(condition, h, 1.0, mask=mask, packing=packing, key=key) - h
        key1, key2 = _split(key)
        a = _scaled(self._attend(self.norm1(h, condition.norm1), condition, mask, packing, key1), condition.gate1)
        inner = h if self.parallel else (h + a).astype(h.dtype)
        assert self.norm2 is not None
        return a + _scaled(self._feed(self.norm2(inner, condition.norm2), condition, key2), condition.gate2)

    def project(
        self,
        condition: Condition,
        h: jax.Array,
        dt: jax.Array | float,
        *,
        mask: jax.Array | None = None,
        packing: Packing | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Post-norm only: returns the state after a step of size `dt`, normalised; InputError for a pre-norm block."""
        if not self.post_norm:
            raise InputError("projected_euler is the step of a post-norm block, and this one is pre-norm: try euler")
        key1, key2 = _split(key)
        gate1, gate2 = (dt if gate is None else dt * gate for gate in (condition.gate1, condition.gate2))
        a = h + gate1 * self._attend(h, condition, mask, packing, key1)
        if self.norm2 is None:
            return self.norm1(a + gate2 * self._feed(h, condition, key2), condition.norm1).astype(h.dtype)
        a = self.norm1(a, condition.norm1).astype(h.dtype)
        return self.norm2(a + gate2 * self._feed(a, condition, key2), condition.norm2).astype(h.dtype)

    def __call__(
        self,
        h: jax.Array,
        t: jax.Array | float = 0.0,
        *,
        mask: jax.Array | None = None,
        packing: Packing | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the block once, as a layer of an ordinary stack: a step of size 1 from time `t`."""
        condition = self.condition(jnp.float32(t))
        if self.post_norm:
            return self.project(condition, h, 1.0, mask=mask, packing=packing, key=key)
        return (h + self.increment(condition, h, mask=mask, packing=packing, key=key)).astype(h.dtype)

    def _attend(
        self,
        x: jax.Array,
        condition: Condition,
        mask: jax.Array | None,
        packing: Packing | None,
        key: jax.Array | None,
    ) -> jax.Array:
        own = condition.residual
        deltas = () if own is None else (own.qkv, own.out)
        out = self.attention(x, mask, *deltas, packing=packing)
        return self.dropout(out, deterministic=key is None, rngs=key)

    def _feed(self, x: jax.Array, condition: Condition, key: jax.Array | None) -> jax.Array:
        own = condition.residual
        out = self.feedforward(x) if own is None else self.feedforward(x, own.up, own.down)
        return self.dropout(out, deterministic=key is None, rngs=key)


class BlockChain(nnx.Module):
    """Several blocks applied one after the other at every depth, as one: it is called as a `SharedBlock` is."""

    def __init__(self, config: ModelConfig, *, start: float = 0.0, rngs: nnx.Rngs):
        self.post_norm = config.norm_placement == "post"
        self.inner = nnx.List([SharedBlock(config, start=start, rngs=rngs) for _ in range(config.inner_blocks)])

    def condition(self, t: jax.Array) -> tuple[Condition, ...]:
        """Returns what each block needs to know of the time `t`."""
        return tuple(block.condition(t) for block in self.inner)

    def increment(
        self,
        condition: tuple[Condition, ...],
        h: jax.Array,
        *,
        mask: jax.Array | None = None,
        packing: Packing | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the derivative of the state: the sum of the blocks' increments, each from where the last led."""
        if self.post_norm:
            return self.project(condition, h, 1.0, mask=mask, packing=packing, key=key) - h
        reached, total = h, jnp.zeros((), h.dtype)
        for i, (block, known) in enumerate(zip(self.inner, condition, strict=True)):
            total = total + block.increment(known, reached, mask=mask, packing=packing, key=_inner_key(key, i))
            reached = (h + total).astype(h.dtype)
        return total

    def project(
        self,
        condition: tuple[Condition, ...],
        h: jax.Array,
        dt: jax.Array | float,
        *,
        mask: jax.Array | None = None,
        packing: Packing | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Post-norm only: returns the state after every block took its step of size `dt`."""
        for i, (block, known) in enumerate(zip(self.inner, condition, strict=True)):
            h = block.project(known, h, dt, mask=mask, packing=packing, key=_inner_key(key, i))
        return h


def _inner_key(key: jax.Array | None, i: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, i)


def _scaled(x: jax.Array, gate: jax.Array | None) -> jax.Array:
    return x if gate is None else x * gate.astype(x.dtype)


def _split(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    if key is None:
        return None, None
    first, second = jax.random.split(key)
    return first, second

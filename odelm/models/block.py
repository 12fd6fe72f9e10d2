"""The shared block: maps a state, conditioned on its time, to the state's increment or its next value.

Pre-norm, the block is a vector field. `a = Attn(N1 h)`, and the increment is `a + MLP(N2(h + a))`, or with
parallel branches `a + MLP(N2 h)`; a step of size `dt` adds `dt` times it.

Post-norm, the block keeps its state normalised, and a step scales the branches *inside* the norms:
`a = N1(h + dt Attn h)`, `h' = N2(a + dt MLP a)`, or with parallel branches `h' = N1(h + dt (Attn h + MLP h))`.
At `dt = 1` that is the block of BERT and ALBERT; at larger steps the norms still return the state to where
the block expects it, which `h + dt (Block(h) - h)` does not beyond `dt = 2`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.models import initialize
from odelm.models.arrays import add, along_last, rounded, scaled
from odelm.models.attention import Attention
from odelm.models.feedforward import FeedForward
from odelm.models.memory import Slot
from odelm.models.modulation import Modulation
from odelm.models.norm import Affine, Norm
from odelm.models.residual import BlockDelta, LayerDelta
from odelm.models.view import View
from odelm.ode.dtypes import at_least_float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Condition:
    """Everything that a block computes from its time: the affine maps of its norms, (D,) gates on its branches, and
    with `wide_modulation` factors on the output of each input map of attention, by the map's name, and on `hidden`
    units (F,)."""

    norm1: Affine
    norm2: Affine | None
    gate1: jax.Array | None
    gate2: jax.Array | None
    delta: BlockDelta | None = None
    scales: dict[str, jax.Array] | None = None


class SharedBlock(nnx.Module):
    """One Transformer block, to be applied many times. All calls take and return states (B, L, D).

    Every call may be given a `view` of the tokens (`odelm.models.View`: padding, packed documents, positions), a `key`
    that turns dropout on, and a `memory` of the keys and values of earlier positions, which is returned updated.

    Args:
        first: the unit of the model's depth that is the block's time 0.
        start: the time at which its stretch begins: 0, except for the later ones of several groups.
        single: whether it replaces one layer only, and so needs no per-layer corrections.
    """

    field_class = "odelm.models.BlockField(block)"

    def __init__(
        self, config: ModelConfig, *, first: int = 0, start: float = 0.0, single: bool = False, rngs: nnx.Rngs
    ):
        config.validate()
        self.parallel = config.parallel_branches
        self.post_norm = config.norm_placement == "post"
        self.attention = Attention(config, rngs=rngs)
        self.feedforward = FeedForward(config, rngs=rngs)
        self.norm1 = Norm(config, config.width)
        self.norm2 = None if self.parallel and self.post_norm else Norm(config, config.width)
        self.branch_factor = initialize.branch_factor(config)
        rows = 4 if self.norm2 is None else 6
        self.modulation = Modulation(config, rows, first=first, rngs=rngs) if config.time_modulation else None
        self.residual = (
            LayerDelta(config, start=start, two_norms=self.norm2 is not None, rngs=rngs)
            if config.layer_rank and not single
            else None
        )
        self.dropout = nnx.Dropout(config.dropout)

    def condition(self, t: jax.Array) -> Condition:
        """Returns the block's condition at the time `t`, a float32 scalar."""
        delta = None if self.residual is None else self.residual(t)
        delta1, delta2 = (None, None) if delta is None else (delta.norm1, delta.norm2)
        factor = self.branch_factor
        if self.modulation is None:
            norm2 = self.norm2 and self.norm2.affine(delta=delta2)
            gate = None if factor == 1 else jnp.full(self.norm1.scale.shape, factor, jnp.float32)
            return Condition(self.norm1.affine(delta=delta1), norm2, gate, gate, delta)
        gate1, gate2, *affine = self.modulation(t)
        norm2 = self.norm2 and self.norm2.affine(*affine[2:], delta=delta2)
        gates = factor * (1 + gate1), factor * (1 + gate2)
        return Condition(self.norm1.affine(*affine[:2], delta=delta1), norm2, *gates, delta, self.modulation.scales(t))

    def increment(
        self,
        condition: Condition,
        h: jax.Array,
        *,
        view: View | None = None,
        key: jax.Array | None = None,
        memory: Slot | None = None,
    ) -> tuple[jax.Array, Slot | None]:
        """Returns the derivative of the state, and the memory."""
        if self.post_norm:
            after, memory = self.step(condition=condition, h=h, dt=1.0, view=view, key=key, memory=memory)
            return after - h, memory
        key1, key2 = _split(key)
        a, memory = self._attend(self.norm1(h, affine=condition.norm1), condition, view, key1, memory)
        a = scaled(a, condition.gate1)
        inner = h if self.parallel else add(h, a).astype(h.dtype)
        assert self.norm2 is not None
        fed = self._feed(self.norm2(inner, affine=condition.norm2), condition, key2)
        return a + scaled(fed, condition.gate2), memory

    def step(
        self,
        condition: Condition,
        h: jax.Array,
        dt: jax.Array | float,
        *,
        view: View | None = None,
        key: jax.Array | None = None,
        memory: Slot | None = None,
    ) -> tuple[jax.Array, Slot | None]:
        """Returns the state after an Euler step of size `dt`, and the memory.

        Pre-norm that is `h + dt * increment`; post-norm the branches are scaled inside the norms.
        """
        if not self.post_norm:
            slope, memory = self.increment(condition=condition, h=h, view=view, key=key, memory=memory)
            return euler(h, slope, dt), memory
        key1, key2 = _split(key)
        a, memory = self._attend(h, condition, view, key1, memory)
        a = _moved(h, dt, condition.gate1, a)
        if self.norm2 is None:
            a = _moved(a, dt, condition.gate2, self._feed(h, condition, key2))
            return rounded(self.norm1(a, affine=condition.norm1), h.dtype), memory
        a = rounded(self.norm1(a, affine=condition.norm1), h.dtype)
        moved = _moved(a, dt, condition.gate2, self._feed(a, condition, key2))
        return rounded(self.norm2(moved, affine=condition.norm2), h.dtype), memory

    def __call__(
        self, h: jax.Array, t: jax.Array | float = 0.0, *, view: View | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """Applies the block once, as a layer of an ordinary stack: a step of size 1 from time `t`."""
        return self.step(condition=self.condition(jnp.float32(t)), h=h, dt=1.0, view=view, key=key)[0]

    def _attend(
        self,
        x: jax.Array,
        condition: Condition,
        view: View | None,
        key: jax.Array | None,
        memory: Slot | None,
    ) -> tuple[jax.Array, Slot | None]:
        inputs, out = (None, None) if condition.delta is None else (condition.delta.inputs, condition.delta.out)
        context, memory = self.attention(
            x, view=view, memory=memory, in_deltas=inputs, out_delta=out, in_scales=condition.scales
        )
        return self.dropout(context, deterministic=key is None, rngs=key), memory

    def _feed(self, x: jax.Array, condition: Condition, key: jax.Array | None) -> jax.Array:
        up, down = (None, None) if condition.delta is None else (condition.delta.up, condition.delta.down)
        scale = None if condition.scales is None else condition.scales["hidden"]
        fed = self.feedforward(x, up_delta=up, down_delta=down, hidden_scale=scale)
        return self.dropout(fed, deterministic=key is None, rngs=key)


def euler(h: jax.Array, slope: jax.Array, dt: jax.Array | float) -> jax.Array:
    """Returns `h + dt * slope`, computed in float32 and returned in the dtype of `h`."""
    wide = at_least_float32(h.dtype)
    return (h.astype(wide) + jnp.asarray(dt, wide) * slope.astype(wide)).astype(h.dtype)


def _moved(h: jax.Array, dt: jax.Array | float, gate: jax.Array | None, branch: jax.Array) -> jax.Array:
    """Returns `h + dt gate branch`, in float32 or wider: it goes into a norm."""
    wide = at_least_float32(h.dtype)
    size = jnp.asarray(dt, wide)
    return h.astype(wide) + (size if gate is None else size * along_last(gate, h.ndim)) * branch.astype(wide)


def _split(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    if key is None:
        return None, None
    first, second = jax.random.split(key)
    return first, second

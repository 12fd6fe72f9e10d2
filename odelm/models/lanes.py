"""Several lanes of state around a shared block, which reads a mix of them and writes to each.

A single state is one sum of all that the depth has added. With n lanes of state the block reads `x = sum_i read_i h_i`,
and `dh_i/dt = write_i f(t, x) + sum_j mix_ij h_j`: information kept for later need not interfere with what is read
next. Hyper-connections (Zhu et al. 2024, arXiv 2409.19606) help more around a looped block than around a stack
(Schwethelm et al. 2026, arXiv 2604.21106: a block looped r times is worth r^0.65 blocks with them, r^0.46 without). The
formulation as a field, with weights that are functions of time, is ours: at unit steps it is their static form.

All lanes start as copies of the state. At initialisation the first is read, all are written and none is mixed, so that
a new model equals the model with one lane.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.models.arrays import along_last
from odelm.models.block import SharedBlock, euler
from odelm.models.chain import BlockChain
from odelm.models.modulation import time_features
from odelm.models.view import View
from odelm.ode.dtypes import at_least_float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LaneCondition:
    """The weights of n lanes at a time, float32: `read` (n,), `write` (n,), `mix` (n, n); and the block's condition."""

    read: jax.Array
    write: jax.Array
    mix: jax.Array
    inner: Any


class LaneBlock(nnx.Module):
    """A pre-norm block on a state of n lanes (B, L, n, D), with the interface of a `SharedBlock`."""

    field_class = "odelm.models.BlockField(block)"

    def __init__(self, config: ModelConfig, *, first: int = 0, start: float = 0.0, rngs: nnx.Rngs):
        block = SharedBlock if config.inner_blocks == 1 else BlockChain
        self.inner = block(config, first=first, start=start, rngs=rngs)
        self.first, self.depth, self.lanes = first, config.depth, config.lanes
        n = config.lanes
        self.weights = nnx.Param(jnp.concatenate([jnp.eye(1, n)[0], jnp.ones(n), jnp.zeros(n * n)]))
        features = time_features(jnp.float32(0)).size
        self.by_time = nnx.Param(jnp.zeros((features, n * (2 + n)), jnp.float32)) if config.time_modulation else None

    def condition(self, t: jax.Array) -> LaneCondition:
        """Returns the condition of the block and its lanes at the time `t`, a float32 scalar."""
        weights, n = self.weights[...], self.lanes
        if self.by_time is not None:
            weights = weights + time_features((self.first + t) / self.depth) @ self.by_time[...]
        return LaneCondition(weights[:n], weights[n : 2 * n], weights[2 * n :].reshape(n, n), self.inner.condition(t))

    def increment(
        self,
        condition: LaneCondition,
        h: jax.Array,
        *,
        view: View | None = None,
        key: jax.Array | None = None,
        memory: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Returns the derivative of the state (B, L, n, D), and the memory."""
        wide = at_least_float32(h.dtype)
        lanes = [h[:, :, i].astype(wide) for i in range(self.lanes)]
        x = _weighted(condition.read, lanes).astype(h.dtype)
        slope, memory = self.inner.increment(condition=condition.inner, h=x, view=view, key=key, memory=memory)
        slope = slope.astype(wide)
        moved = [condition.write[i].astype(wide) * slope + _weighted(condition.mix[i], lanes)
                 for i in range(self.lanes)]  # fmt: skip
        return jnp.stack(moved, axis=2), memory

    def step(
        self,
        condition: LaneCondition,
        h: jax.Array,
        dt: jax.Array | float,
        *,
        view: View | None = None,
        key: jax.Array | None = None,
        memory: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Returns the state after an Euler step of size `dt`, and the memory."""
        slope, memory = self.increment(condition=condition, h=h, view=view, key=key, memory=memory)
        return euler(h, slope, dt), memory


def split(h: jax.Array, lanes: int) -> jax.Array:
    """Returns `lanes` copies of the state (B, L, D) as its lanes (B, L, n, D)."""
    return jnp.stack([h] * lanes, axis=2)


def joined(h: jax.Array) -> jax.Array:
    """Returns the mean of the lanes, (B, L, D) of (B, L, n, D)."""
    return h.astype(at_least_float32(h.dtype)).mean(axis=2).astype(h.dtype)


def _weighted(weights: jax.Array, lanes: list[jax.Array]) -> jax.Array:
    terms = [along_last(weights[i], lane.ndim).astype(lane.dtype) * lane for i, lane in enumerate(lanes)]
    return sum(terms[1:], terms[0])

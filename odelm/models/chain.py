"""Several blocks applied one after the other at every depth: ALBERT's `inner_group_num`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.models.arrays import add
from odelm.models.block import Condition, SharedBlock, euler
from odelm.models.view import View

Conditions = dict[str, Condition]
"""Conditions by the number of the inner block. (Not a tuple: `nnx.tabulate` cannot show a tuple of dataclasses.)"""
Memories = Any
"""A tuple of `Slot`s, one for each inner block."""


class BlockChain(nnx.Module):
    """Several blocks in turn, with the interface of one `SharedBlock`, and a condition and a memory for each."""

    field_class = "odelm.models.BlockField(block)"

    def __init__(
        self, config: ModelConfig, *, first: int = 0, start: float = 0.0, single: bool = False, rngs: nnx.Rngs
    ):
        self.post_norm = config.norm_placement == "post"
        self.inner = nnx.List(
            [
                SharedBlock(config, first=first, start=start, single=single, rngs=rngs)
                for _ in range(config.inner_blocks)
            ]
        )

    def condition(self, t: jax.Array) -> Conditions:
        """Returns the condition of each block at the time `t`."""
        return {str(i): block.condition(t) for i, block in enumerate(self.inner)}

    def increment(
        self,
        condition: Conditions,
        h: jax.Array,
        *,
        view: View | None = None,
        key: jax.Array | None = None,
        memory: Memories | None = None,
    ) -> tuple[jax.Array, Memories | None]:
        """Returns the derivative of the state: the sum of the blocks' increments, each from the state that the one
        before it led to."""
        if self.post_norm:
            after, memory = self.step(condition=condition, h=h, dt=1.0, view=view, key=key, memory=memory)
            return after - h, memory
        h_i, total, memories = h, jnp.zeros((), h.dtype), []
        for i, block in enumerate(self.inner):
            delta, kept = block.increment(
                condition=condition[str(i)], h=h_i, view=view, key=_inner_key(key, i), memory=memory and memory[i]
            )
            total = add(total, delta)
            h_i = add(h, total).astype(h.dtype)
            memories.append(kept)
        return total, memory and tuple(memories)

    def step(
        self,
        condition: Conditions,
        h: jax.Array,
        dt: jax.Array | float,
        *,
        view: View | None = None,
        key: jax.Array | None = None,
        memory: Memories | None = None,
    ) -> tuple[jax.Array, Memories | None]:
        """Returns the state after a step: pre-norm along the sum of increments, post-norm block by block."""
        if not self.post_norm:
            slope, memory = self.increment(condition=condition, h=h, view=view, key=key, memory=memory)
            return euler(h, slope, dt), memory
        memories = []
        for i, block in enumerate(self.inner):
            h, kept = block.step(
                condition=condition[str(i)], h=h, dt=dt, view=view, key=_inner_key(key, i), memory=memory and memory[i]
            )
            memories.append(kept)
        return h, memory and tuple(memories)


def _inner_key(key: jax.Array | None, i: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, i)

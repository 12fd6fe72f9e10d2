"""The block as a vector field over depth time, bound to one call's view of the tokens and its dropout key."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from odelm.models.arrays import constrain
from odelm.models.block import SharedBlock
from odelm.models.chain import BlockChain
from odelm.models.kv_sharing import Sharing
from odelm.models.lanes import LaneBlock
from odelm.models.memory import kept_in, slots_of
from odelm.models.view import View
from odelm.ode.plan import Place

TimedCondition = tuple[Any, jax.Array | None]
"""The block's condition at a time (a `Condition`, a dict of them by inner block, or a `LaneCondition`), and the key of
its dropout."""


@dataclass(frozen=True, eq=False)
class BlockField:
    """`f(t, h)` of one block: an `odelm.ode.RememberingField`, and so also a conditioned and a stepping field.

    Dropout is a function of `t`: its key is folded with the time, so that the field stays a function of (t, h) and
    every integration of it sees the same field. Stages at the same time drop the same units, also where another
    integration reaches that time with a different rounding (`key_at`).

    Called directly it computes keys and values at every time, even for a model with `kv_span`, which shares them along
    the plans that the model makes.
    """

    block: SharedBlock | BlockChain | LaneBlock
    view: View | None = None
    key: jax.Array | None = None
    sharing: Sharing | None = None
    """Which evaluations of a plan share keys and values; None: each has its own."""

    def condition(self, t: jax.Array) -> TimedCondition:
        return self.block.condition(t), None if self.key is None else key_at(self.key, t)

    def increment(self, condition: TimedCondition, h: jax.Array) -> jax.Array:
        return self.increment_remembering(condition, h, None, None)[0]

    def step(self, condition: TimedCondition, h: jax.Array, dt: jax.Array) -> jax.Array:
        return self.step_remembering(condition, h, dt, None, None)[0]

    def increment_remembering(
        self, condition: TimedCondition, h: jax.Array, memory: Any, place: Place
    ) -> tuple[jax.Array, Any]:
        slope, slots = self.block.increment(
            condition=condition[0], h=constrain(h), view=self.view, key=condition[1],
            memory=slots_of(memory, place, self.sharing),
        )  # fmt: skip
        return constrain(slope), kept_in(slots)

    def step_remembering(
        self, condition: TimedCondition, h: jax.Array, dt: jax.Array, memory: Any, place: Place
    ) -> tuple[jax.Array, Any]:
        after, slots = self.block.step(
            condition=condition[0], h=constrain(h), dt=dt, view=self.view, key=condition[1],
            memory=slots_of(memory, place, self.sharing),
        )  # fmt: skip
        return constrain(after), kept_in(slots)

    def __call__(self, t: jax.Array, h: jax.Array) -> jax.Array:
        return self.increment(self.condition(t), h)


def key_at(key: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the dropout key at a scalar time: one key for every 256th part of a unit of depth.

    The parts are shifted so that times which solvers visit, such as halves, thirds and tenths, are not on an edge
    between two parts, where rounding would decide.
    """
    part = jnp.floor(t.astype(jnp.float32) * 256 + 0.381966).astype(jnp.int32)
    return jax.random.fold_in(key, part)

"""How large the inputs of a model's matrices are, at each time along the depth: the ranges that 8 bits must
represent."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from odelm import ode
from odelm.errors import InputError
from odelm.models.embed import Readout
from odelm.models.field import BlockField, TimedCondition
from odelm.models.inputs import Inputs
from odelm.models.lm import CausalLM, MaskedLM
from odelm.models.transformer import DepthPlan, SharedTransformer
from odelm.models.view import see
from odelm.ode.plan import Place

Ranges = dict[str, jax.Array]
"""The largest magnitude of the inputs of each matrix, by its module's name, such as `blocks/0/attention/qkv`; float32
(N, R) at the steps and stages of a plan, for a matrix in a block, and () for one of the readout, whose own matrix is
named `head`."""


def input_ranges(model: SharedTransformer, inputs: Inputs, plan: DepthPlan) -> Ranges:
    """Returns how large the inputs of the matrices are over all tokens, padding included.

    The matrices are those that are multiplied in the dtype of the model's products: all of its blocks and of its
    readout. Raises InputError for a plan that Diffrax integrates, which evaluates the blocks where it chooses to.
    """
    if any(part.solver is not None for part in plan):
        raise InputError("ranges are measured along a plan of integrator='scan', and this one is of 'diffrax'")
    # A copy, so that its modules may be changed here even where the call is traced.
    model, seen = nnx.clone(model), _Seen({})
    names = _watch(model, seen)
    inputs, view, _ = see(inputs.checked(model.config), model.config, None)
    h, found = model._start(inputs, None), {}
    fields, keys = model._on_plan(plan, view), model._shared_keys(h)
    for number, (field, part, own, kept) in enumerate(zip(fields, plan, _by_block(model, names), keys, strict=True)):
        h = model._into_lanes(h, number)
        room = {name: jnp.zeros(part.times.shape, jnp.float32) for name in own}
        watched = _Watched(field.block, field.view, None, field.sharing, seen=seen)
        h, (room, _) = ode.follow(watched, h, part, (room, kept))
        h = model._out_of_lanes(h, number)
        found |= room
    seen.largest.clear()
    _read(model, model._end(h), seen)
    return found | seen.largest


@dataclass
class _Seen:
    """The largest inputs since it was last cleared, by the name of their matrix."""

    largest: dict[str, jax.Array]

    def add(self, name: str, x: jax.Array) -> None:
        size = jnp.abs(x.astype(jnp.float32)).max()
        self.largest[name] = jnp.maximum(size, self.largest[name]) if name in self.largest else size


@dataclass(frozen=True, eq=False)
class _Watched(BlockField):
    """A block's field whose memory holds, beside its usual contents, the largest inputs of its matrices, float32 (N, R)
    each."""

    seen: _Seen = dataclasses.field(kw_only=True)

    def increment_remembering(
        self, condition: TimedCondition, h: jax.Array, memory: Any, place: Place
    ) -> tuple[jax.Array, Any]:
        self.seen.largest.clear()
        room, kept = memory
        slope, kept = super().increment_remembering(condition, h, kept, None if kept is None else place)
        return slope, (self._with_largest(room, place), kept)

    def step_remembering(
        self, condition: TimedCondition, h: jax.Array, dt: jax.Array, memory: Any, place: Place
    ) -> tuple[jax.Array, Any]:
        self.seen.largest.clear()
        room, kept = memory
        after, kept = super().step_remembering(condition, h, dt, kept, None if kept is None else place)
        return after, (self._with_largest(room, place), kept)

    def _with_largest(self, room: Any, place: Place) -> Any:
        assert place is not None
        return {name: one.at[place].set(self.seen.largest[name]) for name, one in room.items()}


def _watch(model: SharedTransformer, seen: _Seen) -> list[str]:
    """Lets linear maps report their inputs, and returns their names."""
    names = []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear | nnx.LinearGeneral) and module.dtype is not None:
            names.append("/".join(map(str, path)))
            module.dot_general = _reporting(names[-1], seen)
    return names


def _reporting(name: str, seen: _Seen) -> Callable[..., jax.Array]:
    def dot_general(x: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
        seen.add(name, x)
        return jax.lax.dot_general(x, *arguments, **options)

    return dot_general


def _by_block(model: SharedTransformer, names: list[str]) -> list[list[str]]:
    """Returns the names of each block in turn."""
    parts = (("prelude", model.prelude), ("blocks", model.blocks), ("coda", model.coda))
    blocks = [f"{part}/{number}/" for part, of_part in parts for number in range(len(of_part))]
    return [[name for name in names if name.startswith(block)] for block in blocks]


def _read(model: SharedTransformer, hidden: jax.Array, seen: _Seen) -> None:
    """Lets the readout of a language model report its inputs."""
    if isinstance(model, CausalLM | MaskedLM):
        assert isinstance(model.head, Readout)
        seen.add("head", model.head.parts(hidden, model.embed.tokens[...])[0])

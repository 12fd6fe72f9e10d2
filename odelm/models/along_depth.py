"""How large the state is along the depth, and the field that moves it."""

from typing import Any

import jax
import jax.numpy as jnp

from odelm import ode
from odelm.models.field import BlockField, TimedCondition
from odelm.models.inputs import Inputs
from odelm.models.transformer import SharedTransformer
from odelm.models.view import see
from odelm.ode.plan import Place


def norms_along_depth(model: SharedTransformer, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Returns two root mean squares for each unit of full depth, over all tokens and coordinates: of the state before
    the unit, and of the increment that the unit adds; float32 (depth,) each."""
    inputs, view, _ = see(inputs.checked(model.config), model.config, None)
    plan = model.plan()
    h, found = model._start(inputs, None), []
    parts = zip(model._on_plan(plan, view), plan, model._shared_keys(h), strict=True)
    for number, (field, part, kept) in enumerate(parts):
        h = model._into_lanes(h, number)
        room = jnp.zeros((*part.times.shape, 2), jnp.float32)
        h, (norms, _) = ode.follow(_Recorder(field.block, field.view, None, field.sharing), h, part, (room, kept))
        h = model._out_of_lanes(h, number)
        found.append(norms[:, 0])
    states, slopes = jnp.concatenate(found).T
    return states, slopes


class _Recorder(BlockField):
    """A block's field whose memory holds, beside its usual contents, the norms of its unit steps, float32 (2,)."""

    def step_remembering(
        self, condition: TimedCondition, h: jax.Array, dt: jax.Array, memory: Any, place: Place
    ) -> tuple[jax.Array, Any]:
        assert place is not None
        room, kept = memory
        after, kept = super().step_remembering(condition, h, dt, kept, None if kept is None else place)
        norms = jnp.stack([_size(h), _size(after.astype(jnp.float32) - h.astype(jnp.float32))])
        return after, (room.at[place].set(norms), kept)


def _size(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x.astype(jnp.float32)).mean())

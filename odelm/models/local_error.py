"""The error that a single large step adds to full depth's trajectory, at every place of the depth."""

import jax
import jax.numpy as jnp
import numpy as np

from odelm import ode
from odelm.models.field import BlockField
from odelm.models.inputs import Inputs
from odelm.models.transformer import SharedTransformer
from odelm.models.view import see


def local_errors(model: SharedTransformer, inputs: Inputs) -> jax.Array:
    """Returns the local error of one Euler step from each whole time i of the core to each later one j.

    The step starts from full depth's state at i, and its result is compared with full depth's state at j: the error is
    the mean square of the difference over the mean square of the state, float32 (C, C + 1); 0 for a unit step, and inf
    where there is no such step: backwards, or across a boundary between groups. With `model.kv_span` the errors are
    those of steps that compute keys and values of their own.
    """
    config = model.config
    inputs, view, _ = see(inputs.checked(config), config, None)
    h, share = model._start(inputs, None), config.core // config.groups
    errors = jnp.full((config.core, config.core + 1), jnp.inf, jnp.float32)
    for number, field in enumerate(model._fields(view)):
        group = number - config.prelude
        h = model._into_lanes(h, number)
        if 0 <= group < config.groups:
            start = group * share
            states = _trajectory(field, h, start, share)
            errors = errors.at[start : start + share, start : start + share + 1].set(_of_group(field, states, start))
            h = states[-1]
        else:
            h = ode.integrate(field, h, [0.0, 1.0])
        h = model._out_of_lanes(h, number)
    return errors


def _trajectory(field: BlockField, h: jax.Array, start: int, steps: int) -> jax.Array:
    """Returns the state at the whole times from `start` on, (steps + 1, ...)."""

    def step(h: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        after = ode.integrate(field, h, jnp.stack([t, t + 1]))
        return after, after

    _, later = jax.lax.scan(step, h, jnp.arange(start, start + steps, dtype=jnp.float32))
    return jnp.concatenate([h[None], later])


def _of_group(field: BlockField, states: jax.Array, start: int) -> jax.Array:
    """Returns the errors of the steps within a group, float32 (steps, steps + 1), given its states (steps + 1, ...)."""
    steps = len(states) - 1
    pairs = np.argwhere(np.triu(np.ones((steps, steps + 1), bool), 1))

    def error(pair: jax.Array) -> jax.Array:
        i, j = pair
        end = ode.integrate(field, states[i], start + pair.astype(jnp.float32))
        right = states[j].astype(jnp.float32)
        return jnp.square(end.astype(jnp.float32) - right).sum() / jnp.square(right).sum()

    found = jax.lax.map(error, jnp.asarray(pairs))
    return jnp.full((steps, steps + 1), jnp.inf, jnp.float32).at[pairs[:, 0], pairs[:, 1]].set(found)

"""Rotary positions (Su et al. 2021, arXiv 2104.09864): queries and keys turned by angles, so that distance counts."""

import jax
import jax.numpy as jnp

Angles = tuple[jax.Array, jax.Array]
"""Cosines and sines, float32 (L, K/2) each, or (B, L, K/2) where the positions differ between rows."""


def rotary_angles(length: int, size: int, base: float) -> Angles:
    """Returns the cosines and sines of the positions 0 to L - 1, float32 (L, K/2) each."""
    rates = base ** (-jnp.arange(0, size, 2) / size)
    angles = jnp.arange(length)[:, None] * rates
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (k, k + K/2) of `x` (B, L, H, K) by their positions' angles, (L, K/2) or (B, L, K/2)."""
    cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

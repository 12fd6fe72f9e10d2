"""Activations of one argument, by the operations that a kernel has."""

import math

import jax
import jax.numpy as jnp

ERFC = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
"""Coefficients of an approximation of the complementary error function from 0 on, within 1.5e-7 of it (Abramowitz and
Stegun, 7.1.26)."""


def activated(x: jax.Array, name: str) -> jax.Array:
    """Applies the activation of a name."""
    match name:
        case "gelu":
            return x * _normal_distribution(x)
        case "gelu_tanh":
            return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        case "relu":
            return jnp.maximum(x, 0.0)
        case "relu2":
            return jnp.square(jnp.maximum(x, 0.0))
        case "silu":
            return x / (1 + jnp.exp(-x))
    raise ValueError(f"activation is {name!r}")


def _normal_distribution(x: jax.Array) -> jax.Array:
    """Returns the probability that a standard normal number is below x; kernels have no error function."""
    size = jnp.maximum(x, -x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * size)
    polynomial = jnp.zeros_like(x)
    for coefficient in reversed(ERFC):
        polynomial = t * (polynomial + coefficient)
    above = 0.5 * polynomial * jnp.exp(-size * size)
    return jnp.where(x < 0, above, 1 - above)

"""Activations of one argument, by the operations that a kernel has."""

import math

import jax
import jax.numpy as jnp
from jax import lax


def activated(x: jax.Array, name: str) -> jax.Array:
    """Applies the activation of a name."""
    match name:
        case "gelu":
            return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))
        case "gelu_tanh":
            return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        case "relu":
            return jnp.maximum(x, 0.0)
        case "relu2":
            return jnp.square(jnp.maximum(x, 0.0))
        case "silu":
            return x / (1 + jnp.exp(-x))
    raise ValueError(f"activation is {name!r}")

"""Which dtype a sum is taken in, chosen here and not by JAX's promotion, which the user may have disabled."""

from typing import Any

import jax
import jax.numpy as jnp


def wider(*dtypes: Any) -> jnp.dtype:
    """Returns the dtype that holds the values of all, by JAX's standard rules."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def at_least_float32(dtype: Any) -> jnp.dtype:
    """Returns float32 for integers and narrower floats, else the dtype itself."""
    return wider(dtype, jnp.float32)

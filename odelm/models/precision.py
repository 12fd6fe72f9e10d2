"""Which dtypes a model computes in. Parameters, times, norms, softmax and losses are always float32."""

import jax
import jax.numpy as jnp

from odelm.config import ModelConfig


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Returns the dtype of matrix products; "auto" is bfloat16 on GPU and TPU and float32 on CPU."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def state_dtype(config: ModelConfig) -> jnp.dtype:
    """Returns the dtype of the state that is integrated; "auto" is that of the matrix products."""
    return compute_dtype(config) if config.residual_dtype == "auto" else jnp.dtype(config.residual_dtype)


def upcast_float16_on_cpu(x: jax.Array) -> jax.Array:
    """Returns an operand of a product that is accumulated in float32: float16 becomes float32 on CPU.

    There XLA lacks this product for float16, and raises an error.
    """
    return x.astype(jnp.float32) if x.dtype == jnp.float16 and jax.default_backend() == "cpu" else x

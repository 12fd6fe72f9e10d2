"""Multi-head attention over one sequence, causal or not, with rotary positions and query-key norm as options."""

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.models import initialize
from odelm.models.norm import Norm
from odelm.models.precision import compute_dtype, summed_in_float32
from odelm.models.residual import Delta


def rotary_angles(length: int, size: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines of rotary positions, float32 (L, K/2) each (Su et al. 2021, arXiv 2104.09864)."""
    rates = base ** (-jnp.arange(0, size, 2) / size)
    angles = jnp.arange(length)[:, None] * rates
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (k, k + K/2) of `x` (B, L, H, K) by their positions' angles."""
    cos, sin = cos[:, None, :].astype(x.dtype), sin[:, None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2), the three input projections in one."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, H, K = config.width, config.heads, config.head_size
        dtype = compute_dtype(config)
        self.causal = config.kind == "decoder"
        self.rotary_base = config.rotary_base if config.positions == "rotary" else None
        self.qkv = nnx.LinearGeneral(
            D, (3, H, K), use_bias=config.bias, dtype=dtype, kernel_init=initialize.matrix, rngs=rngs
        )
        self.out = nnx.LinearGeneral(
            (H, K),
            D,
            axis=(-2, -1),
            use_bias=config.bias,
            dtype=dtype,
            kernel_init=initialize.residual_matrix(config),
            rngs=rngs,
        )
        self.query_norm = Norm(config, K) if config.qk_norm else None
        self.key_norm = Norm(config, K) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        qkv_delta: Delta | None = None,
        out_delta: Delta | None = None,
    ) -> jax.Array:
        """Returns (B, L, D). `mask` is bool (B, S), True at the positions that may be attended to.

        The deltas are added to the two linear maps.
        """
        qkv = self.qkv(x)
        if qkv_delta is not None:
            qkv = qkv + qkv_delta(x.astype(qkv.dtype)).reshape(qkv.shape)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary_base is not None:
            angles = rotary_angles(x.shape[1], q.shape[-1], self.rotary_base)
            q, k = rotate(q, *angles), rotate(k, *angles)
        allowed = None if mask is None else mask[:, None, None, :]
        wide = (summed_in_float32(part) for part in (q, k, v))
        mixed = jax.nn.dot_product_attention(*wide, mask=allowed, is_causal=self.causal).astype(v.dtype)
        out = self.out(mixed)
        return out if out_delta is None else out + out_delta(mixed.reshape(out.shape))

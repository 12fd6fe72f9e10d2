"""Multi-head attention over one sequence, causal or not, with rotary positions and query-key norm as options."""

import jax
from flax import nnx

from odelm.config import ModelConfig
from odelm.models import initialize
from odelm.models.norm import Norm
from odelm.models.packing import Packing
from odelm.models.precision import compute_dtype, summed_in_float32
from odelm.models.residual import Delta
from odelm.models.rotary import Angles, rotary_angles, rotate


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
        packing: Packing | None = None,
    ) -> jax.Array:
        """Returns (B, L, D). `mask` is bool (B, S), True at the positions that may be attended to.

        The deltas are added to the two linear maps. With a packing, a position attends to those of its own segment.
        """
        qkv = self.qkv(x)
        if qkv_delta is not None:
            qkv = qkv + qkv_delta(x.astype(qkv.dtype)).reshape(qkv.shape)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        angles = self._angles(q, packing)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        wide = (summed_in_float32(part) for part in (q, k, v))
        mixed = jax.nn.dot_product_attention(*wide, mask=_allowed(mask, packing), is_causal=self.causal).astype(v.dtype)
        out = self.out(mixed)
        return out if out_delta is None else out + out_delta(mixed.reshape(out.shape))

    def _angles(self, q: jax.Array, packing: Packing | None) -> Angles | None:
        if packing is not None:
            return packing.angles
        return None if self.rotary_base is None else rotary_angles(q.shape[1], q.shape[-1], self.rotary_base)


def _allowed(mask: jax.Array | None, packing: Packing | None) -> jax.Array | None:
    """Returns which keys a query may attend to, apart from causality: bool (B, 1, 1 or L, S), None for all."""
    real = None if mask is None else mask[:, None, None, :]
    if packing is None:
        return real
    return packing.together() if real is None else packing.together() & real

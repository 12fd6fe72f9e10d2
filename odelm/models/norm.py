"""LayerNorm and RMSNorm whose scale and shift can be set from outside, which is how time modulates them."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from odelm.config import ModelConfig
from odelm.models.arrays import along_last
from odelm.models.residual import NormDelta

_KEPT = jax.checkpoint_policies.save_only_these_names("mean", "rms")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    """The map that is applied after normalising: float32 `scale` (D,) and `shift` (D,) or None."""

    scale: jax.Array
    shift: jax.Array | None


class Norm(nnx.Module):
    """Normalises over the last axis in float32, then applies its affine map, or the one it is given."""

    def __init__(self, config: ModelConfig, size: int):
        self.kind = config.norm
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32)) if config.bias else None

    def affine(
        self, gamma: jax.Array | None = None, beta: jax.Array | None = None, *, delta: NormDelta | None = None
    ) -> Affine:
        """Returns `(scale + delta) (1 + gamma)` and `(bias + delta) (1 + gamma) + beta`, as far as they are given."""
        scale, shift = self.scale[...], self.bias[...] if self.bias is not None else None
        if delta is not None:
            scale, shift = scale + delta.scale, shift if shift is None or delta.bias is None else shift + delta.bias
        if gamma is None or beta is None:
            return Affine(scale, shift)
        return Affine(scale * (1 + gamma), beta if shift is None else shift * (1 + gamma) + beta)

    def __call__(self, x: jax.Array, affine: Affine | None = None) -> jax.Array:
        """Returns the normalised `x`, shape and dtype unchanged.

        For the gradient it keeps `x`, its mean and its scale; by default JAX would keep the normalised `x` too, in
        float32, which takes longer to write and to read than to compute again.
        """

        @functools.partial(jax.checkpoint, policy=_KEPT)
        def normalised(x: jax.Array, affine: Affine) -> jax.Array:
            y = x.astype(jnp.float32)
            if self.kind == "layernorm":
                y = y - checkpoint_name(y.mean(-1, keepdims=True), "mean")
            y = y * checkpoint_name(jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps), "rms")
            y = y * along_last(affine.scale, y.ndim)
            return (y if affine.shift is None else y + along_last(affine.shift, y.ndim)).astype(x.dtype)

        return normalised(x, self.affine() if affine is None else affine)

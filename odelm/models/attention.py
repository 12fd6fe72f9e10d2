"""Multi-head attention, causal or not, with options for rotary positions, query-key norm, fewer key-value heads and a
memory of earlier keys and values."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.models import initialize
from odelm.models.arrays import scaled
from odelm.models.heads import input_maps
from odelm.models.memory import Slot
from odelm.models.norm import Norm
from odelm.models.precision import compute_dtype, upcast_float16_on_cpu
from odelm.models.residual import Delta
from odelm.models.view import Angles, View, rotary_angles

CUDNN_FROM = 256
"""The shortest length at which cuDNN's attention was measured to be faster, with a mask or without (docs/results.md,
"Attention on a GPU")."""
CUDNN_FROM_OF_MANY, MANY = 128, 1024
"""The same length where the keys of all rows together are at least `MANY`."""
SPLASH_LANES, SPLASH_FROM = 128, 512
"""Splash attention requires lengths that are multiples of the first, and is chosen from the second on: shorter rows
have few scores. (Not measured: no TPU was at hand.)"""


class Attention(nnx.Module):
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2), with the three input projections fused.

    With fewer key-value heads, J of them, the queries have their own projection, and query head h attends with
    key-value head h // (H / J).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, H, K = config.width, config.heads, config.head_size
        dtype = compute_dtype(config)
        self.causal = config.kind == "decoder"
        self.implementation = config.attention
        self.rotary_base = config.rotary_base if config.positions == "rotary" else None
        self.head_size = K
        maps = {
            name: nnx.LinearGeneral(
                D, shape, use_bias=config.bias, dtype=dtype, kernel_init=initialize.matrix, rngs=rngs
            )
            for name, shape in input_maps(config).items()
        }
        self.qkv, self.query, self.key_value = (maps.get(name) for name in ("qkv", "query", "key_value"))
        self.out = nnx.LinearGeneral(
            (H, K),
            D,
            axis=(-2, -1),
            use_bias=config.bias,
            dtype=dtype,
            kernel_init=initialize.branch_output(config),
            rngs=rngs,
        )
        # Three maps for queries, keys and values, in place of `qkv`: see odelm.infer.on_gpu.
        self.separate: nnx.List[nnx.Linear] | None = None
        self.query_norm = Norm(config, K) if config.qk_norm else None
        self.key_norm = Norm(config, K) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        view: View | None = None,
        memory: Slot | None = None,
        *,
        in_deltas: Mapping[str, Delta] | None = None,
        out_delta: Delta | None = None,
        in_scales: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, Slot | None]:
        """Returns (B, L, D) for `x` (B, L, D), and the memory with the keys and values of these positions written to
        it.

        `view` has the tokens' positions and the mask; None is one sequence from position 0, without padding. The deltas
        are added to the linear maps; then queries, keys and values are multiplied by `in_scales`, each of the shape of
        its map's output. `in_deltas` and `in_scales` are by the names of `odelm.models.heads.input_maps`.
        """
        view = self._view(x.shape[1]) if view is None else view
        q, k, v = self._projected(x, in_deltas, in_scales)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if view.angles is not None:
            q, k = rotate(q, view.angles), rotate(k, view.angles)
        if memory is not None:
            k, v, memory = memory.exchanged(k, v, view.start, alone=view.alone)
        context = self._attend(q, k, v, view)
        out = self.out(context)
        return (out if out_delta is None else out + out_delta(context.reshape(out.shape))), memory

    def _projected(
        self, x: jax.Array, deltas: Mapping[str, Delta] | None, scales: Mapping[str, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the queries (B, L, H, K), keys and values (B, L, J, K)."""

        def mapped(linear: nnx.LinearGeneral, name: str) -> jax.Array:
            y = linear(x)
            if deltas is not None:
                y = y + deltas[name](x.astype(y.dtype)).reshape(y.shape)
            return scaled(y, None if scales is None else scales[name])

        if self.separate is not None:
            q, k, v = (linear(x).reshape(*x.shape[:-1], -1, self.head_size) for linear in self.separate)
            return q, k, v
        if self.qkv is not None:
            qkv = mapped(self.qkv, "qkv")
            return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        assert self.query is not None and self.key_value is not None
        key_value = mapped(self.key_value, "key_value")
        return mapped(self.query, "query"), key_value[:, :, 0], key_value[:, :, 1]

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, view: View) -> jax.Array:
        """Returns the attention-weighted mean of the values (B, S, J, K) for each query (B, L, H, K)."""
        if view.start is None and takes_splash(self.implementation, q):  # prompts are of any length
            from odelm.models.splash import splash_attention  # Pallas takes a while to import

            return splash_attention(q, k, v, segments=view.segment_ids(q.shape[:2]), causal=self.causal)
        segments = view.segment_ids(q.shape[:2]) if view.start is None and view.segments is not None else None
        if segments is not None and takes_packed(self.implementation, q, k):
            from odelm.models.packed_attention import packed_attention

            return packed_attention(q, k, v, segments=segments, causal=self.causal)
        implementation = "auto" if self.implementation == "splash" else self.implementation
        chosen = choose_implementation(implementation, q, k)
        causal = self.causal and view.alone
        if chosen == "cudnn" and view.lengths is not None and view.segments is view.positions is None:
            return attend(q, k, v, lengths=view.lengths, causal=causal, implementation=chosen)
        mask = view.allowed(q.shape[1], causal=self.causal)
        return attend(q, k, v, mask=mask, causal=causal, implementation=chosen)

    def _view(self, length: int) -> View:
        if self.rotary_base is None:
            return View()
        return View(rotary_angles(jnp.arange(length), self.head_size, self.rotary_base))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    lengths: jax.Array | None = None,
    causal: bool,
    implementation: str,
) -> jax.Array:
    """Returns the attention-weighted mean of the values (B, S, J, K) for each query (B, L, H, K), in their dtype; J
    divides H.

    `mask` is bool (B or 1, 1, L or 1, S), `lengths`, int32 (B,), the number of leading keys of each row that may be
    attended to, `implementation` one of `odelm.config.ATTENTIONS`.
    """
    chosen = choose_implementation(implementation, q, k)
    if chosen == "cudnn" and mask is not None:
        # cuDNN takes a mask only if it has a row for every query.
        mask = jnp.broadcast_to(mask, (mask.shape[0], 1, q.shape[1], k.shape[1]))
    if lengths is not None:
        lengths = jnp.maximum(lengths.astype(jnp.int32), 1)  # the mean over no keys is undefined
    q, k, v = (upcast_float16_on_cpu(part) for part in (q, k, v))
    with jax.numpy_dtype_promotion("standard"):  # the softmax inside mixes float32 with 16 bits
        context = jax.nn.dot_product_attention(
            q, k, v, mask=mask, key_value_seq_lengths=lengths, is_causal=causal, implementation=chosen
        )
    return context.astype(v.dtype)


def takes_splash(implementation: str, q: jax.Array) -> bool:
    """Returns whether attention without a memory is computed by `odelm.models.splash`; "auto" chooses it on TPUs.

    Raises InputError if "splash" is asked for at a length that it cannot compute.
    """
    length = q.shape[1]
    if implementation == "splash" and length % SPLASH_LANES:
        raise InputError(
            f"model.attention is 'splash', but the length is {length}: expected a multiple of {SPLASH_LANES}, or "
            "model.attention='auto'"
        )
    on_tpu = jax.default_backend() == "tpu"
    return implementation == "splash" or (implementation == "auto" and on_tpu and splash_pays(length))


def splash_pays(length: int) -> bool:
    """Returns whether `auto` chooses splash attention at a length, on a TPU."""
    return length % SPLASH_LANES == 0 and length >= SPLASH_FROM


def takes_packed(implementation: str, q: jax.Array, k: jax.Array) -> bool:
    """Returns whether attention within documents is computed by `odelm.models.packed_attention`."""
    if implementation != "auto" or jax.default_backend() != "gpu" or q.dtype not in (jnp.float16, jnp.bfloat16):
        return False
    from odelm.models.packed_attention import packed_pays

    return packed_pays(q, k)


def choose_implementation(implementation: str, q: jax.Array, k: jax.Array) -> Literal["xla", "cudnn"]:
    """Returns "xla" or "cudnn"; "auto" chooses cuDNN where it can be used and was measured to be faster.

    Raises InputError if "cudnn" is asked for where it is missing or cannot compute.
    """
    sixteen_bits = q.dtype in (jnp.float16, jnp.bfloat16)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    available = jax.default_backend() == "gpu" and sixteen_bits and fits
    if implementation == "cudnn" and not available:
        raise InputError(
            f"model.attention is 'cudnn', but here are {q.dtype}, heads of size {q.shape[-1]} and backend "
            f"{jax.default_backend()!r}; expected float16 or bfloat16, heads of a multiple of 8 up to 128, and a GPU: "
            "try 'auto'"
        )
    return "cudnn" if implementation == "cudnn" or (implementation == "auto" and available and _pays(q, k)) else "xla"


def _pays(q: jax.Array, k: jax.Array) -> bool:
    """Returns whether cuDNN's attention is usable and faster; it has no gradient for odd lengths with a mask."""
    lengths = q.shape[1], k.shape[1]
    many = q.shape[0] * min(lengths) >= MANY
    return min(lengths) >= (CUDNN_FROM_OF_MANY if many else CUDNN_FROM) and not any(length % 2 for length in lengths)


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Turns the pairs (k, k + K/2) of `x` (B, L, H, K) by their positions' angles, in float32; the dtype is kept."""
    # (1 or B, L, 1, 1, K/2), and the pairs as (B, L, H, 2, K/2): a reversal that swaps the halves fuses with the
    # operations around it, a concatenation would not.
    cos, sin = (part[..., None, None, :] if part.ndim == 3 else part[None, :, None, None, :] for part in angles)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    sign = jnp.array([-1.0, 1.0], jnp.float32).reshape(1, 1, 1, 2, 1)
    return (pairs * cos + jnp.flip(pairs, axis=-2) * (sign * sin)).reshape(x.shape).astype(x.dtype)

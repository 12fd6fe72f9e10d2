"""Attention on GPUs within each document that is packed in a row, by the Triton kernel that JAX has.

cuDNN and XLA take a mask, (rows, 1, length, length), where this kernel takes the number of each token's document.
"""

import functools
import importlib
import importlib.util
import math
import warnings
from typing import Any

import jax

from odelm.models.arrays import by_rows_and_heads, cuts_evenly

KERNELS = "jax.experimental.pallas.ops.gpu.attention"
"""JAX has announced that it will drop this kernel in favour of another package; without the kernel attention takes a
mask."""
BLOCK = 64
"""How many queries and keys the kernel computes at a time: lengths are multiples of this."""
LENGTHS = 128, 1024
"""The shortest and longest lengths at which it was measured to be faster than cuDNN (docs/results.md, "Attention on a
GPU")."""
SIZES = 16, 32, 64, 128
"""Head sizes that it takes without padding."""


def packed_pays(q: jax.Array, k: jax.Array) -> bool:
    """Returns whether the kernel is available and faster, on a GPU and in 16 bits, for queries (B, L, H, K) and
    keys."""
    length = q.shape[1]
    fits = q.shape == k.shape and q.shape[-1] in SIZES and length % BLOCK == 0 and cuts_evenly(q)
    return fits and LENGTHS[0] <= length <= LENGTHS[1] and _is_there()


def packed_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array, causal: bool) -> jax.Array:
    """Returns the attention-weighted mean of the values (B, L, H, K) for each query (B, L, H, K), in their dtype.

    A token attends to those of its own segment, int32 (B, L). L is a multiple of `BLOCK`. Off a GPU the kernel is
    interpreted, which is slow but correct.
    """

    def on_device(*parts: jax.Array) -> jax.Array:
        ways = {"cuda": False, "default": True}
        calls = {name: functools.partial(_attend, causal=causal, interpret=how) for name, how in ways.items()}
        return jax.lax.platform_dependent(*parts, **calls)

    return by_rows_and_heads(on_device, q, k, v, segments)


def _is_there() -> bool:
    """Returns whether this JAX has the kernel for NVIDIA GPUs, the only ones on which it was tried."""
    if "rocm" in str(getattr(jax.devices()[0].client, "platform_version", "")).lower():
        return False
    try:
        return importlib.util.find_spec(KERNELS) is not None
    except ModuleNotFoundError:  # raised where a parent package is missing
        return False


@functools.cache
def _kernels() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(KERNELS)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, causal: bool, interpret: bool
) -> jax.Array:
    kernels = _kernels()
    sizes = kernels.BlockSizes(*(BLOCK,) * 6)
    scale = 1 / math.sqrt(q.shape[-1])
    values: Any = kernels.mha(q, k, v, segments, scale, causal, sizes, interpret=interpret)
    return values.astype(v.dtype)

"""Attention on GPUs among the tokens of each document that is packed in a row: the kernel for Triton that JAX has.

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
"""JAX has announced that it will give this up for another package; without it attention takes a mask."""
BLOCK = 64
"""Queries and keys that the kernel computes at a time: lengths are multiples of it."""
LENGTHS = 128, 1024
"""Lengths from and to which it was measured to be faster than cuDNN (docs/results.md, "Attention on a GPU")."""
SIZES = 16, 32, 64, 128
"""Sizes of a head that it takes without filling them up."""


def packed_pays(q: jax.Array, k: jax.Array) -> bool:
    """Returns whether the kernel is there, and pays, on a GPU and in 16 bits, for queries (B, L, H, K) and keys."""
    length = q.shape[1]
    fits = q.shape == k.shape and q.shape[-1] in SIZES and length % BLOCK == 0 and cuts_evenly(q)
    return fits and LENGTHS[0] <= length <= LENGTHS[1] and _is_there()


def packed_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array, causal: bool) -> jax.Array:
    """Returns the values (B, L, H, K) averaged for each query (B, L, H, K), in their dtype.

    A token attends to those of its own segment, int32 (B, L). L is a multiple of `BLOCK`. Off a GPU the kernel is
    interpreted, which is slow, and right.
    """

    def on_device(*parts: jax.Array) -> jax.Array:
        ways = {"cuda": False, "default": True}
        calls = {name: functools.partial(_attend, causal=causal, interpret=how) for name, how in ways.items()}
        return jax.lax.platform_dependent(*parts, **calls)

    return by_rows_and_heads(on_device, q, k, v, segments)


def _is_there() -> bool:
    """Returns whether this JAX has the kernel, for NVIDIA's cards, of which alone it was tried."""
    if "rocm" in str(getattr(jax.devices()[0].client, "platform_version", "")).lower():
        return False
    try:
        return importlib.util.find_spec(KERNELS) is not None
    except ModuleNotFoundError:  # of a package above it
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

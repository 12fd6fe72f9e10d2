"""Vectors in memory, without marks."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.marked import ROW

plgpu: Any = mosaic_gpu
Ref = Any


def vector(ref: Ref, layout: Any = ROW) -> jax.Array:
    """Returns a vector in a layout, read from memory."""
    return plgpu.load(ref, layout=layout, optimized=False)


def put(x: jax.Array, ref: Ref) -> None:
    """Writes a vector to global memory, whatever its layout."""
    if hasattr(plgpu, "store"):  # since jax 0.12, where a plain write must fill whole sectors of memory
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x

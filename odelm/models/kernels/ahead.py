"""Loading from memory into the L2 cache, before a program has room for the data in its shared memory.

A copy from the card's memory takes longer to arrive than one from the L2 cache. The places for copies in a program's
shared memory are few, so that copies from memory alone are slower than memory is (docs/kernels.md, "Ahead").
"""

from math import prod
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from odelm.models.kernels.marked import thread
from odelm.models.kernels.signals import mosaic

plgpu: Any = mosaic_gpu
Ref = Any
AHEAD_BYTES = 24_000_000
"""How much all programs together may load ahead: about half of the L2 cache of an H100 or H200."""


def load_ahead(ref: Ref) -> None:
    """Starts to load an array, whose numbers are beside each other, into the L2 cache. Its size must be a multiple of
    16 bytes."""
    text = load_text(prod(ref.shape) * jnp.dtype(ref.dtype).itemsize)

    def load(context: Any, ref: Any) -> None:
        del context
        i32 = ir.IntegerType.get_signless(32)
        mine = arith.cmpi(arith.CmpIPredicate.eq, thread(), arith.constant(i32, 0))
        mosaic.inline_ptx(text, mosaic.memref_ptr(ref), mine, has_side_effects=True)

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(load)(ref)


def load_text(size: int) -> str:
    """Returns the PTX that loads `size` bytes from the address $0 on, in the threads where $1 holds."""
    assert size % 16 == 0, size
    return f"@$1 cp.async.bulk.prefetch.L2.global [$0], {size};"


def load_places_ahead(*refs: Ref) -> None:
    """Starts to load some numbers of each of several neighbouring places of a memory, (places, numbers), into the L2
    cache."""
    for ref in refs:
        plgpu.async_prefetch(ref)

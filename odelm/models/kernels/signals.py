"""Signals between the programs of a kernel, for which Pallas lacks a name, and numbers hidden from the compiler."""

from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu

plgpu: Any = mosaic_gpu
mosaic: Any = utils
"""The layer that Pallas makes kernels of; its names differ between releases of JAX too."""
Ref = Any
_inlined = signature(mosaic.inline_ptx).parameters if hasattr(mosaic, "inline_ptx") else {}  # since jax 0.11
CONVERGENT: dict[str, Any] = {"convergent": True} if "convergent" in _inlined else {}
"""Says that all threads of a warp take part in some PTX."""


def arrive(counter: Ref) -> None:
    """Adds 1 to a counter, int32 (1,) in global memory, after everything that this program wrote.

    (The semaphores of Pallas are visible to other devices too, which takes longer.)
    """

    def signal(context: Any, counter: Any) -> None:
        del context
        mosaic.warpgroup_barrier()
        mosaic.SemaphoreRef(mosaic.memref_ptr(counter)).signal(1, memory_scope="gpu")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(signal)(counter)


def wait(counter: Ref, target: jax.Array) -> None:
    """Waits until a counter, int32 (1,) in global memory, has reached a target, int32 ()."""

    def reach(context: Any, counter: Any, target: Any) -> None:
        del context
        semaphore = mosaic.SemaphoreRef(mosaic.memref_ptr(counter))
        semaphore.wait(target.registers.item(), decrement=False, memory_scope="gpu")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))(reach)(counter, target)


def meet_warps() -> None:
    """Waits until all warps of this program have arrived."""

    def meet(context: Any) -> None:
        del context
        mosaic.warpgroup_barrier()

    plgpu.inline_mgpu()(meet)()


def raise_to(value: jax.Array, ref: Ref, mark: jax.Array) -> None:
    """Raises a word of global memory, int32 (2,), to a value, float32 (), unless it has a higher one. The word begins
    anew with each mark, int32 (), which must be above earlier marks.

    The word is one number of 64 bits: the mark in front, then the value's bits, changed so that they sort as the values
    do.
    """

    def write(context: Any, value: Any, ref: Any, mark: Any) -> None:
        del context
        i32 = ir.IntegerType.get_signless(32)
        thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
        mine = arith.cmpi(arith.CmpIPredicate.eq, thread, arith.constant(i32, 0))
        given = mosaic.memref_ptr(ref), value.registers.item(), mark.registers.item(), mine
        mosaic.inline_ptx(_RAISE, *given, has_side_effects=True)

    splat = plgpu.Layout.WG_SPLAT
    plgpu.inline_mgpu(arg_types=(splat, plgpu.RefType(), splat))(write)(value, ref, mark)


_RAISE = """{ .reg .b32 bits, sign; .reg .b64 word;
mov.b32 bits, $1; shr.s32 sign, bits, 31; or.b32 sign, sign, 0x80000000; xor.b32 bits, bits, sign;
mov.b64 word, {bits, $2}; @$3 red.relaxed.gpu.global.max.u64 [$0], word; }"""


def highest(ref: Ref, mark: jax.Array, default: float) -> jax.Array:
    """Returns the highest value that was written to a word with this mark so far, float32 (), or the default before the
    first. All threads of a warp get the same value; warps may see different ones."""

    def read(context: Any, ref: Any, mark: Any) -> Any:
        del context
        none = arith.constant(ir.F32Type.get(), default)
        given = mosaic.memref_ptr(ref), mark.registers.item(), none
        results = dict(result_types=ir.F32Type.get(), has_side_effects=True, **CONVERGENT)
        found = mosaic.inline_ptx(_HIGHEST, *given, **results)
        return FragmentedArray.splat(found, ())

    splat = plgpu.Layout.WG_SPLAT
    shape = plgpu.ShapeDtypeStruct((), jnp.float32, layout=splat)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat), return_type=shape)(read)(ref, mark)


_HIGHEST = """{ .reg .b32 bits, sign, mark; .reg .b64 word; .reg .pred its;
ld.relaxed.gpu.global.b64 word, [$1]; mov.b64 {bits, mark}, word;
shr.s32 sign, bits, 31; not.b32 sign, sign; or.b32 sign, sign, 0x80000000; xor.b32 bits, bits, sign;
setp.eq.s32 its, mark, $2; @!its mov.b32 bits, $3;
shfl.sync.idx.b32 bits, bits, 0, 31, 0xffffffff; mov.b32 $0, bits; }"""


def opaque(number: jax.Array) -> jax.Array:
    """Returns an int32 () unchanged, hidden from the compiler."""
    splat = plgpu.Layout.WG_SPLAT

    def same(context: Any, number: Any) -> Any:
        del context
        value = number.registers.item()
        found = mosaic.inline_ptx("mov.u32 $0, $1;", value, result_types=value.type, has_side_effects=True)
        return number.splat(found, (), is_signed=True)

    shape = plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat)
    return plgpu.inline_mgpu(arg_types=(splat,), return_type=shape)(same)(number)


def order_copies_after_stores() -> None:
    """Orders the copying unit's reads of global memory after stores that this program knows of: that unit has its own
    path to memory (PTX, "Proxies")."""

    def order(context: Any) -> None:
        del context
        mosaic.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    plgpu.inline_mgpu()(order)()

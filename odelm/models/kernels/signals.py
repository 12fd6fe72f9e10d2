"""Signals between the programs of a kernel, for which Pallas lacks a name, and numbers hidden from the compiler."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu
mosaic: Any = utils
"""What Pallas makes kernels of, whose names differ between releases of JAX too."""
Ref = Any


def arrive(counter: Ref) -> None:
    """Adds 1 to a counter, int32 (1,) in global memory, behind all that this program wrote.

    (The semaphores of Pallas are seen by other devices too, which takes longer.)
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
    """Orders the copying unit's reads of global memory after stores that this program knows of: it has a path to memory
    of its own (PTX, "Proxies")."""

    def order(context: Any) -> None:
        del context
        mosaic.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    plgpu.inline_mgpu()(order)()

"""What all phases of a kernel share: its arrays, the barrier between phases, and products with a block's matrices."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.layout import COLUMNS, ROWS, Layout

plgpu: Any = mosaic_gpu
"""Whose names and signatures differ between releases of JAX."""
Ref = Any
"""An array that a kernel reads and writes in place."""
COLUMN, ROW = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)
"""How a warpgroup holds a vector: as one row of a matrix (one number a column), or as one column of it."""
Fill = Callable[[jax.Array, Ref], None]
"""Writes inputs from an offset on into the right side of a product, (slice, `COLUMNS`)."""
Store = Callable[[jax.Array, jax.Array, jax.Array], None]
"""Takes the number of a tile of `ROWS` outputs, that of a slice of inputs, and the sums over it (`ROWS`,)."""


@dataclass(frozen=True)
class Token:
    """The token that is computed; int32 () each."""

    word: jax.Array
    position: jax.Array
    place: jax.Array
    """Where its key and value go in the memory."""


@dataclass
class Program:
    """One of the programs of a kernel, which all run at once, a warpgroup each."""

    layout: Layout
    me: jax.Array
    """int32 (), its number."""
    matrices: dict[str, Ref]
    """Of `tables.matrices`, in global memory as the next two."""
    vectors: dict[str, Ref]
    """Of `tables.vectors`."""
    between: dict[str, Ref]
    """What phases hand on to each other, as in `exchanged`."""
    keys: Ref
    """(N, S, J K) of the memory, and the values; read and written."""
    values: Ref
    near: dict[str, Ref]
    """Shared memory and its barriers, as in `scratch`."""
    arrived: Ref | None = field(default=None)
    """What programs count themselves in as they meet, int32 (1,), 0 at first; None is no meeting, because they end
    after each phase."""

    @property
    def alone(self) -> bool:
        """Whether a phase is a launch of its own, so that no piece of a matrix is sent for ahead of it."""
        return self.arrived is None and self.layout.programs > 1

    def meet(self, count: jax.Array) -> jax.Array:
        """Waits until all programs are here, for the time `count`, from 0 on; returns the next count.

        What they wrote before is then seen by all.
        """
        if self.arrived is not None:
            meet(self.arrived, (count + 1) * self.layout.programs)
        return count + 1

    def see_stores(self) -> None:
        """Lets the copies that this program starts see what programs stored before they met."""
        if self.arrived is not None:
            order_copies_after_stores()

    def share(self, count: int, work: Callable[[jax.Array], None]) -> None:
        """Does this program's part of `count` pieces of work."""
        pl.when(self.me < count)(lambda: work(self.me))
        self._share_rest(count, work)

    def fetch(self, name: str, step: jax.Array, item: jax.Array | None = None) -> None:
        """Starts to copy a piece of a matrix into shared memory: this program's first, or `item`.

        The four maps of a block take turns with two places, so that a piece is on its way while the phases before it
        are computed. A place must not be in use.
        """
        ahead, item = item is None, self.me if item is None else item
        size, splits, place = self.layout.slice, self._splits(name), self._place(name)

        def copy() -> None:
            tile, part = item // splits, lax.rem(item, splits)
            of = (self.vectors["block"][step], pl.ds(tile * ROWS, ROWS), pl.ds(part * size, size))
            plgpu.copy_gmem_to_smem(self.matrices[name].at[of], self.near["matrix"].at[place], self._bar(place))

        pl.when(item < self._count(name))(copy) if ahead else copy()

    def multiply(self, name: str, step: jax.Array, fill: Fill, store: Store) -> None:
        """Computes this program's part of a linear map of a block, of which the first piece is on its way.

        Then it sends for the next piece that takes the same place. A program that is `alone` sends for its own first.
        """
        size, splits, place = self.layout.slice, self._splits(name), self._place(name)
        matrix, inputs = self.near["matrix"].at[place], self.near["inputs"].at[pl.ds(0, size)]

        def work(item: jax.Array) -> None:
            tile, part = item // splits, lax.rem(item, splits)
            fill(part * size, inputs)
            plgpu.commit_smem()
            plgpu.barrier_wait(self._bar(place))
            store(tile, part, self.product(lambda acc: plgpu.wgmma(acc, matrix, inputs)))

        def fetched(item: jax.Array) -> None:
            self.fetch(name, step, item)
            work(item)

        count, order = self._count(name), self.layout.maps
        if self.alone:
            self.share(count, fetched)
            return
        pl.when(self.me < count)(lambda: work(self.me))
        self._share_rest(count, fetched)
        after = order[(order.index(name) + 2) % 4]
        self.fetch(after, lax.rem(step + 1, self.layout.steps) if name in order[2:] else step)

    def product(self, add: Callable[[Ref], None]) -> jax.Array:
        """Returns (`ROWS`,) float32, what `add` sums up in an accumulator whose columns are all equal."""

        def summed(acc: Ref) -> jax.Array:
            add(acc)
            return acc[...]

        return jnp.max(pl.run_scoped(summed, plgpu.ACC((ROWS, COLUMNS), jnp.float32)), axis=1)

    def wait_for_pieces(self) -> None:
        """Waits for what is still on its way before the program ends."""
        for place, name in enumerate(self.layout.maps[:2]):
            pl.when(self.me < self._count(name))(lambda place=place: plgpu.barrier_wait(self._bar(place)))

    def normalise(self, h: jax.Array, name: str, step: jax.Array | None = None) -> None:
        """Keeps the normalised state (D,) near, times the scale `name`, plus its shift; those of a step if given."""
        if self.layout.norm == "layernorm":
            h = h - jnp.sum(h) / self.layout.width
        h = h * lax.rsqrt(jnp.sum(h * h) / self.layout.width + self.layout.eps)
        scale, shift = self.vectors[f"{name}_scale"], self.vectors[f"{name}_shift"]
        place = ... if step is None else step
        self.near["state"][...] = h * scale[place] + shift[place]

    def take(self, offset: jax.Array | int, inputs: Ref) -> None:
        """Writes a slice of the normalised state into the right side of a product."""
        self.spread(vector(self.near["state"].at[pl.ds(offset, inputs.shape[0])]), inputs)

    def spread(self, x: jax.Array, inputs: Ref) -> None:
        """Writes a vector into all columns of the right side of a product."""
        inputs[...] = lax.broadcast_in_dim(x.astype(self.layout.dtype), inputs.shape, (0,))

    def summed(self, name: str) -> jax.Array:
        """Returns the sum over the slices of what all programs stored under a name."""
        return sum_of([self.between[name][i] for i in range(self.between[name].shape[0])])

    def _share_rest(self, count: int, work: Callable[[jax.Array], None]) -> None:
        programs = self.layout.programs
        if count <= programs:
            return

        @pl.loop(1, -(-count // programs))
        def rest(i: jax.Array) -> None:
            item = i * programs + self.me
            pl.when(item < count)(lambda: work(item))

    def _splits(self, name: str) -> int:
        return self.matrices[name].shape[2] // self.layout.slice

    def _count(self, name: str) -> int:
        return self.matrices[name].shape[1] // ROWS * self._splits(name)

    def _place(self, name: str) -> int:
        return self.layout.maps.index(name) % 2

    def _bar(self, place: int) -> Ref:
        return self.near["arrival"].at[place]


def meet(counter: Ref, target: jax.Array) -> None:
    """Adds 1 to a counter, int32 (1,) in global memory, and waits until it has reached a target, int32 ().

    All that a program wrote before is then seen by those of the same GPU. (The semaphores of Pallas are seen by other
    devices too, which takes longer.)
    """
    mosaic = _mosaic()

    def cross(context: Any, counter: Any, target: Any) -> None:
        del context
        semaphore = mosaic.SemaphoreRef(mosaic.memref_ptr(counter))
        mosaic.warpgroup_barrier()
        semaphore.signal(1, memory_scope="gpu")
        semaphore.wait(target.registers.item(), decrement=False, memory_scope="gpu")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))(cross)(counter, target)


def order_copies_after_stores() -> None:
    """Orders the copying unit's reads of global memory after stores that this program knows of: it has a path to memory
    of its own (PTX, "Proxies")."""
    mosaic = _mosaic()

    def order(context: Any) -> None:
        del context
        mosaic.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    plgpu.inline_mgpu()(order)()


def _mosaic() -> Any:
    """Returns what a kernel is made of where Pallas has no name for it."""
    from jax.experimental.mosaic.gpu import utils

    return utils


def vector(ref: Ref, layout: Any = ROW) -> jax.Array:
    """Returns a vector in a layout, read from memory."""
    return plgpu.load(ref, layout=layout, optimized=False)


def sum_of(parts: list[jax.Array]) -> jax.Array:
    """Returns the sum of a list that has something in it."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def exchanged(layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays through which programs hand results on, in global memory, with zeros where they begin."""
    s, L = layout, layout.slice
    H, K, C, D = s.heads, s.head_size, s.chunk_splits, s.width
    shapes = {
        "state": (2, D), "qkv": (D // L, s.mapped_heads, 2 * K), "context": (C, H, K), "top": (H, C), "total": (H, C),
        "out": (H * K // L, D), "up": (D // L, s.up), "down": (s.hidden // L, D),
        "best": (s.slots,), "sum": (s.slots,),
    }  # fmt: skip
    found = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    whole = {"best_word": s.slots, "arrived": 1}
    return found | {name: jax.ShapeDtypeStruct((size,), jnp.int32) for name, size in whole.items()}


def scratch(layout: Layout) -> dict[str, Any]:
    """Returns what a program has in shared memory."""
    s, dtype = layout, layout.dtype
    return {
        "state": plgpu.SMEM((s.width,), jnp.float32),
        "inputs": plgpu.SMEM((max(s.width, s.slice), COLUMNS), dtype),
        "matrix": plgpu.SMEM((2, ROWS, s.slice), dtype),
        "arrival": plgpu.Barrier(num_barriers=2),
        "keys": plgpu.SMEM((s.chunk, s.head_size), dtype),
        "values": plgpu.SMEM((s.chunk, s.head_size), dtype),
        "memory_arrival": plgpu.Barrier(num_barriers=2),
        "readout": plgpu.SMEM((s.ring, ROWS, s.ring_slice), dtype),
        "readout_arrival": plgpu.Barrier(num_barriers=s.ring),
    }

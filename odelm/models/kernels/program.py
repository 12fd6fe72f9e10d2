"""What all phases of a kernel share: its arrays, the barrier between phases, and products with a block's matrices."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
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
"""Writes inputs from an offset on into the right side of a product, (`COLUMNS`, slice)."""
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
    meeting: bool
    """Whether programs meet between phases; otherwise each phase is a launch of its own."""

    def meet(self, count: jax.Array) -> jax.Array:
        """Waits until all programs are here, for the time `count`, from 0 on; returns the next count.

        What they wrote before is then seen by all.
        """
        if self.meeting and self.layout.programs > 1:
            meet(self.between["arrived"], (count + 1) * self.layout.programs)
        return count + 1

    def see_stores(self) -> None:
        """Lets the copies that this program starts see what programs stored before they met."""
        if self.meeting and self.layout.programs > 1:
            order_copies_after_stores()

    def share(self, count: int, work: Callable[[Any, jax.Array], None]) -> None:
        """Does this program's part of `count` pieces of work: `work(n, piece)` for its n-th."""
        programs = self.layout.programs
        if count <= programs:
            pl.when(self.me < count)(lambda: work(0, self.me))
            return

        @pl.loop(0, -(-count // programs))
        def one(number: jax.Array) -> None:
            piece = number * programs + self.me
            pl.when(piece < count)(lambda: work(number, piece))

    def fetch(self, name: str, step: jax.Array) -> None:
        """Starts to copy this program's pieces of a map, for a step, into their place, which must not be in use."""
        layout, splits, size = self.layout, self.layout.splits(name), self.layout.slice_of(name)
        place, arrival = self._place(name)

        def piece(number: jax.Array, item: jax.Array) -> None:
            tile, part = item // splits, lax.rem(item, splits)
            of = (self.vectors["block"][step], pl.ds(tile * ROWS, ROWS), pl.ds(part * size, size))
            plgpu.copy_gmem_to_smem(self.matrices[name].at[of], place.at[number], arrival.at[number])

        self.share(layout.pieces(name), piece)

    def multiply(self, name: str, step: jax.Array, fill: Fill, store: Store) -> None:
        """Computes this program's part of a linear map of a block, whose pieces are near or on their way.

        Then it sends for the next ones of that place, unless they stay. Where a phase is a launch of its own, it sends
        for its own first, and for no others.
        """
        splits, size = self.layout.splits(name), self.layout.slice_of(name)
        (place, arrival), inputs = self._place(name), self.near["inputs"].at[:, pl.ds(0, size)]
        if not self.meeting:
            self.fetch(name, step)

        def piece(number: jax.Array, item: jax.Array) -> None:
            fill(lax.rem(item, splits) * size, inputs)
            plgpu.commit_smem()
            if not self.stays(name):
                plgpu.barrier_wait(arrival.at[number])
            sums = self.product(lambda acc: plgpu.wgmma(acc, place.at[number], inputs.transpose((1, 0))))
            store(item // splits, lax.rem(item, splits), sums)

        self.share(self.layout.pieces(name), piece)
        if self.meeting and not self.stays(name):
            names = next(names for names in self.layout.places if name in names)
            last = name == names[-1]
            self.fetch(names[0] if last else names[-1], lax.rem(step + 1, self.layout.steps) if last else step)

    def stays(self, name: str) -> bool:
        """Whether the pieces of a map stay in shared memory, since all steps have one block."""
        return not self.layout.sharing and self.meeting and self.matrices[name].shape[0] == 1

    def begin(self) -> None:
        """Sends for the first pieces of every place, and waits for those that stay."""
        for names in self.layout.places:
            self.fetch(names[0], jnp.int32(0))
        self._wait(staying=True)

    def end(self) -> None:
        """Waits for what is still on its way."""
        self._wait(staying=False)

    def product(self, accumulate: Callable[[Ref], None]) -> jax.Array:
        """Returns (`ROWS`,) float32, what `accumulate` sums up in an accumulator whose columns are all equal."""

        def summed(acc: Ref) -> jax.Array:
            accumulate(acc)
            return acc[...]

        return jnp.max(pl.run_scoped(summed, plgpu.ACC((ROWS, COLUMNS), jnp.float32)), axis=1)

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
        self.spread(vector(self.near["state"].at[pl.ds(offset, inputs.shape[1])]), inputs)

    def spread(self, x: jax.Array, inputs: Ref) -> None:
        """Writes a vector into all columns of the right side of a product."""
        columns = inputs.transpose((1, 0))
        columns[...] = lax.broadcast_in_dim(x.astype(self.layout.dtype), columns.shape, (0,))

    def summed(self, name: str) -> jax.Array:
        """Returns the sum over the slices of what all programs stored under a name."""
        return reduce(add, [self.between[name][i] for i in range(self.between[name].shape[0])])

    def _wait(self, *, staying: bool) -> None:
        for names in self.layout.places:
            if self.stays(names[0]) == staying:
                _, arrival = self._place(names[0])

                def piece(number: jax.Array, _: jax.Array, arrival: Ref = arrival) -> None:
                    plgpu.barrier_wait(arrival.at[number])

                self.share(self.layout.pieces(names[0]), piece)

    def _place(self, name: str) -> tuple[Ref, Ref]:
        """Returns the place of a map's pieces in shared memory, and what says that each has arrived."""
        number = next(i for i, names in enumerate(self.layout.places) if name in names)
        return self.near["matrices"][number], self.near["arrivals"][number]


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


def put(x: jax.Array, ref: Ref) -> None:
    """Writes a vector to global memory, whatever its layout."""
    if hasattr(plgpu, "store"):  # since jax 0.12, where a plain write must fill whole sectors of memory
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def exchanged(layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays through which programs hand results on, in global memory, with zeros where they begin."""
    s, splits = layout, layout.splits
    H, K, C, D = s.heads, s.head_size, s.chunk_splits, s.width
    shapes = {
        "state": (2, D), "qkv": (splits("qkv"), s.mapped_heads, 2 * K), "context": (C, H, K), "top": (H, C),
        "total": (H, C), "out": (splits("out"), D), "up": (splits("up"), s.up), "down": (splits("down"), D),
        "best": (s.slots,), "best_logit": (s.slots,), "top_logit": (s.slots,), "sum": (s.slots,),
    }  # fmt: skip
    found = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    whole = {"best_word": s.slots, "arrived": 1}
    return found | {name: jax.ShapeDtypeStruct((size,), jnp.int32) for name, size in whole.items()}


def scratch(layout: Layout) -> dict[str, Any]:
    """Returns what a program has in shared memory."""
    s, dtype = layout, layout.dtype
    return {
        "state": plgpu.SMEM((s.width,), jnp.float32),
        "inputs": plgpu.SMEM((COLUMNS, max(s.width, *s.slices)), dtype),
        "matrices": [plgpu.SMEM(s.place_shape(names), dtype) for names in s.places],
        "arrivals": [plgpu.Barrier(num_barriers=s.place_shape(names)[0]) for names in s.places],
        "keys": plgpu.SMEM((s.chunk, s.head_size), dtype),
        "values": plgpu.SMEM((s.chunk, s.head_size), dtype),
        "memory_arrival": plgpu.Barrier(num_barriers=2),
        "readout": plgpu.SMEM((s.ring, ROWS, s.ring_slice), dtype),
        "readout_arrival": plgpu.Barrier(num_barriers=s.ring),
    }

"""What all phases of a kernel share: its arrays, the barrier between phases, and products with a block's matrices."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.layout import COLUMNS, ROWS, TURNS, Layout

plgpu: Any = mosaic_gpu
"""Whose names and signatures differ between releases of JAX."""
Ref = Any
"""An array that a kernel reads and writes in place."""
COLUMN, ROW = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)
"""How a warpgroup holds a vector: as one row of a matrix (one number a column), or as one column of it."""
Fill = Callable[[jax.Array, Ref], None]
"""Writes inputs from an offset on into the right side of a product, (`COLUMNS`, slice)."""
Constants = Callable[[jax.Array], tuple[jax.Array, ...]]
"""Returns the vectors (`ROWS`,) that a tile of `ROWS` outputs needs in the end; they come in the meantime."""
Store = Callable[..., None]
"""Takes the number of a tile, that of a slice of inputs, the sums over it (`ROWS`,), and the tile's constants."""


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
    zero: Any = 0
    """0, of which the compiler may know nothing."""

    def arrive(self, part: jax.Array) -> None:
        """Says that this program has done its `part` of a phase, if it has one.

        Who has none does not keep others waiting: what it reads has to stay until it comes to do something.
        """
        if self.meeting and self.layout.programs > 1:
            with jax.named_scope("arrive"):
                pl.when(part)(lambda: arrive(self.between["arrived"]))

    def wait(self, count: jax.Array) -> None:
        """Waits until programs have arrived `count` times in all. What they wrote before is then seen."""
        if self.meeting and self.layout.programs > 1:
            with jax.named_scope("wait"):
                wait(self.between["arrived"], count)

    def has(self, *names: str) -> jax.Array:
        """Whether this program has a piece of any of these maps; with no names, a part in attention."""
        if not names:
            return self.me < self.layout.participants()
        return reduce(jnp.logical_or, [self._has(name, 0) for name in names])

    def anew(self) -> "Program":
        """Returns this program with numbers that the compiler takes for other ones.

        It would compute all addresses that depend on them before all loops, far more than there are registers.
        """
        if not (self.meeting and self.layout.programs > 1):
            return self
        return replace(self, me=unknown(self.me), zero=unknown(jnp.int32(0)))

    def see_stores(self) -> None:
        """Lets the copies that this program starts see what programs stored before they met."""
        if self.meeting and self.layout.programs > 1:
            order_copies_after_stores()

    def share(self, count: int, work: Callable[[Any, jax.Array], None]) -> None:
        """Does this program's part of `count` pieces of work: `work(n, piece)` for its n-th."""
        self._share(count, self.me, self.layout.programs, work)

    def multiply(
        self, name: str, step: jax.Array, constants: Constants, prepare: Callable[[], None], fill: Fill, store: Store
    ) -> None:
        """Computes this program's pieces of a linear map of a block, which are near or on their way.

        Programs that have one `prepare` first. As soon as a piece has been used, the next one of its place is sent for,
        unless it stays. Where a phase is a launch of its own, it sends for its own.
        """
        splits, size = self.layout.splits(name), self.layout.slice_of(name)
        inputs = self.inputs.at[:, pl.ds(0, size)]

        if not self.meeting:
            pl.when(self._has(name, 0))(lambda: self._fetch(name, 0, step))

        def piece(number: Any, item: jax.Array) -> None:
            given = constants(item // splits)
            pl.when(number == 0)(prepare)
            with jax.named_scope("fill"):
                fill(lax.rem(item, splits) * size, inputs)
                plgpu.commit_smem()
            pl.when(self._comes(name, step))(lambda: self._wait(name))
            with jax.named_scope("product"):
                sums = self.product(lambda acc: self._multiply_near(name, acc))
            pl.when(self._goes(name, step))(lambda: self._fetch_after(name, number, step))
            with jax.named_scope("store"):
                store(item // splits, lax.rem(item, splits), sums, *given)

        rank, span = self._rank(name)
        self._share(self.layout.pieces(name), rank, span, piece)

    @property
    def inputs(self) -> Ref:
        """The right side of a product, turned: (`COLUMNS`, inputs)."""
        return self.near["inputs"].at[self.zero]

    def begin(self) -> None:
        """Sends for the first piece of every place, and waits for the one that stays."""
        self._fetch_first(TURNS, jnp.int32(0))
        pl.when(self._stays())(lambda: self._wait(TURNS[0]))
        self.begin_token()

    def begin_token(self) -> None:
        """Sends for the piece of `out`, whose places the readout leaves after every token."""
        pl.when(self._has("out", 0))(lambda: self._fetch("out", 0, jnp.int32(0)))

    def end(self) -> None:
        """Waits for what is still on its way."""
        pl.when((self._count() > 0) & ~self._stays())(lambda: self._wait(TURNS[0]))
        pl.when(self._has("out", 0))(lambda: self._wait("out"))

    def product(self, accumulate: Callable[[Ref], None]) -> jax.Array:
        """Returns (`ROWS`,) float32, what `accumulate` sums up in an accumulator whose columns are all equal."""

        def summed(acc: Ref) -> jax.Array:
            accumulate(acc)
            return acc[...]

        return jnp.max(pl.run_scoped(summed, plgpu.ACC((ROWS, COLUMNS), jnp.float32)), axis=1)

    def affine(self, name: str, step: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns a norm's scale and shift (D,), of a step if given."""
        place = ... if step is None else step
        return self.vectors[f"{name}_scale"][place], self.vectors[f"{name}_shift"][place]

    def normalise(self, h: jax.Array, affine: tuple[jax.Array, jax.Array]) -> None:
        """Keeps the normalised state (D,) near, times the scale, plus the shift."""
        scale, shift = affine
        with jax.named_scope("normalise"):
            if self.layout.norm == "layernorm":
                h = h - jnp.sum(h) / self.layout.width
            h = h * lax.rsqrt(jnp.sum(h * h) / self.layout.width + self.layout.eps)
            self.near["state"].at[pl.ds(0, self.layout.width)][...] = h * scale + shift

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

    def turned(self, x: jax.Array) -> jax.Array:
        """Returns the outputs of a tile (`ROWS`,) with its halves swapped."""
        near, half = self.near["turned"], ROWS // 2
        near.at[pl.ds(0, ROWS)][...] = x
        near.at[pl.ds(ROWS, ROWS)][...] = x
        return vector(near.at[pl.ds(half, ROWS)])

    def _share(self, count: int, rank: jax.Array, span: int, work: Callable[[Any, jax.Array], None]) -> None:
        """Does the pieces `rank`, `rank` + `span` .. of `count`, none if the rank is below 0."""
        if count <= span:
            pl.when((rank >= 0) & (rank < count))(lambda: work(0, rank))
            return

        @pl.loop(0, -(-count // span))
        def one(number: jax.Array) -> None:
            piece = number * span + rank
            pl.when((rank >= 0) & (piece < count))(lambda: work(number, piece))

    def _rank(self, name: str) -> tuple[jax.Array, int]:
        """Returns the first piece of a map that this program has, below 0 if it cannot have one, and how many pieces
        further the next is."""
        base, first, span = self.layout.owners(name)
        return jnp.where(self.me < base, -1, lax.rem(self.me - base + span - first, span)), span

    def _has(self, name: str, number: Any) -> jax.Array:
        """Whether this program has a `number`-th piece of a map."""
        rank, span = self._rank(name)
        return (rank >= 0) & (rank + number * span < self.layout.pieces(name))

    def _count(self) -> jax.Array:
        """Returns how many pieces this program has of the maps that take turns."""
        rounds = [(name, number) for name in TURNS for number in range(self.layout.rounds(name))]
        return reduce(add, [self._has(*one).astype(jnp.int32) for one in rounds])

    @property
    def _same(self) -> bool:
        """Whether what belongs to a program's place may stay there: all steps have one block."""
        return self.meeting and self.matrices["qkv"].shape[0] == 1

    def _stays(self) -> jax.Array:
        """Whether a piece is the only one that takes turns, with itself."""
        return (self._count() == 1) if self._same else jnp.bool(False)

    def _comes(self, name: str, step: jax.Array) -> jax.Array:
        """Whether a piece that is about to be used was sent for after the last use of its place."""
        if name in TURNS:
            return ~self._stays()
        return (step == 0) | (not (self._same and self.layout.rounds(name) == 1))

    def _goes(self, name: str, step: jax.Array) -> jax.Array:
        """Whether a piece that has been used makes room for another one."""
        if name in TURNS:
            return ~self._stays()
        return jnp.bool(not (self._same and self.layout.rounds(name) == 1))

    def _wait(self, name: str) -> None:
        """Waits for the piece in the place of a map."""
        for number, _ in enumerate(self._places(name)):
            plgpu.barrier_wait(self.near["arrivals"].at[number if name in TURNS else 1 + number])

    def _multiply_near(self, name: str, acc: Ref) -> None:
        """Multiplies the piece in the place of a map by the inputs."""
        for number, place in enumerate(self._places(name)):
            size = place.shape[1]
            inputs = self.inputs.at[:, pl.ds(number * size, size)]
            plgpu.wgmma(acc, place, inputs.transpose((1, 0)))

    def _fetch(self, name: str, number: Any, step: jax.Array) -> None:
        """Starts to copy the `number`-th of this program's pieces of a map, for a step, into its place."""
        splits, length = self.layout.splits(name), self.layout.slice_of(name)
        rank, span = self._rank(name)
        item, block = rank + number * span, self.vectors["block"][step]
        for part, place in enumerate(self._places(name)):
            size = place.shape[1]
            start = lax.rem(item, splits) * length + part * size
            of = (block, pl.ds(item // splits * ROWS, ROWS), pl.ds(start, size))
            arrival = self.near["arrivals"].at[part if name in TURNS else 1 + part]
            plgpu.copy_gmem_to_smem(self.matrices[name].at[of], place, arrival)

    def _fetch_first(self, names: tuple[str, ...], step: jax.Array) -> None:
        """Sends for the first piece that this program has of these maps."""
        if names:
            lax.cond(
                self._has(names[0], 0),
                lambda: self._fetch(names[0], 0, step),
                lambda: self._fetch_first(names[1:], step),
            )

    def _fetch_after(self, name: str, number: Any, step: jax.Array) -> None:
        """Sends for the piece that is multiplied next after the `number`-th of a map; only of this map where a phase is
        a launch of its own."""
        names = TURNS if name in TURNS else (name,)
        later, following = names[names.index(name) + 1 :], lax.rem(step + 1, self.layout.steps)

        def first() -> None:
            # Of `out` there is none to send for behind the last step, where the readout begins.
            pl.when((following > 0) | (name in TURNS))(lambda: self._fetch_first(names, following))

        def others() -> None:
            if self.meeting:
                some = reduce(jnp.logical_or, [self._has(one, 0) for one in later], jnp.bool(False))
                lax.cond(some, lambda: self._fetch_first(later, step), first)

        lax.cond(self._has(name, number + 1), lambda: self._fetch(name, number + 1, step), others)

    def _places(self, name: str) -> list[Ref]:
        """Returns where the parts of a map's pieces are in shared memory."""
        if name in TURNS:
            return [self.near["matrix"].at[self.zero]]
        return [self.near["readout"].at[slot] for slot in range(self.layout.early, self.layout.ring)]


def arrive(counter: Ref) -> None:
    """Adds 1 to a counter, int32 (1,) in global memory, behind all that this program wrote.

    (The semaphores of Pallas are seen by other devices too, which takes longer.)
    """
    mosaic = _mosaic()

    def signal(context: Any, counter: Any) -> None:
        del context
        mosaic.warpgroup_barrier()
        mosaic.SemaphoreRef(mosaic.memref_ptr(counter)).signal(1, memory_scope="gpu")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(signal)(counter)


def wait(counter: Ref, target: jax.Array) -> None:
    """Waits until a counter, int32 (1,) in global memory, has reached a target, int32 ()."""
    mosaic = _mosaic()

    def reach(context: Any, counter: Any, target: Any) -> None:
        del context
        semaphore = mosaic.SemaphoreRef(mosaic.memref_ptr(counter))
        semaphore.wait(target.registers.item(), decrement=False, memory_scope="gpu")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))(reach)(counter, target)


def unknown(number: jax.Array) -> jax.Array:
    """Returns an int32 () unchanged, as a number of which the compiler knows nothing."""
    mosaic = _mosaic()
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
    """Returns the arrays through which programs hand results on, in global memory, with zeros where they begin.

    States and best tokens take turns with two places: a program may read the one while the next is written.
    """
    s, D, attended = layout, layout.width, (layout.chunk_splits, layout.heads * layout.head_size)
    shapes = {
        "state": (2, D), "qkv": (s.mapped_heads, s.head_size), "context": attended, "weight": attended,
        "out": (s.splits("out"), D), "up": (s.factors, s.filled_hidden), "down": (s.splits("down"), D),
        "best": (2, s.slots), "best_logit": (2, s.slots), "top_logit": (2, s.slots), "sum": (2, s.slots),
    }  # fmt: skip
    found = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    whole = {"best_word": (2, s.slots), "arrived": (1,)}
    return found | {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in whole.items()}


def scratch(layout: Layout) -> dict[str, Any]:
    """Returns what a program has in shared memory."""
    s, dtype = layout, layout.dtype
    return {
        "state": plgpu.SMEM((s.longest,), jnp.float32),
        "turned": plgpu.SMEM((2 * ROWS,), jnp.float32),
        "inputs": plgpu.SMEM((1, COLUMNS, s.longest), dtype),
        "matrix": plgpu.SMEM((1, ROWS, s.width), dtype),
        "arrivals": plgpu.Barrier(num_barriers=1 + s.ring - s.early),
        "keys": plgpu.SMEM((s.chunk, s.head_size), dtype),
        "values": plgpu.SMEM((s.chunk, s.head_size), dtype),
        "hidden": plgpu.SMEM((s.chunk,), jnp.float32),
        "memory_arrival": plgpu.Barrier(num_barriers=3),
        "readout": plgpu.SMEM((s.ring, ROWS, s.ring_slice), dtype),
        "readout_arrival": plgpu.Barrier(num_barriers=s.ring),
    }

"""What all phases of a kernel share: its arrays, the results that programs publish, and the vectors that they multiply
by."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.by_warps import put_pairs
from odelm.models.kernels.in_bytes import UNIT, put_bytes, with_columns_added
from odelm.models.kernels.layout import ROWS, Layout
from odelm.models.kernels.marked import ROW, put_columns_marked, put_marked, read_marked, strided
from odelm.models.kernels.paired import put_columns_paired, put_paired, read_paired
from odelm.models.kernels.pieces import Pieces, share
from odelm.models.kernels.plain import put, vector
from odelm.models.kernels.portions import participants, portions
from odelm.models.kernels.several import column_of, take_received
from odelm.models.kernels.signals import arrive, opaque, order_copies_after_stores, wait
from odelm.models.kernels.sums import NAMES as SUMS
from odelm.models.kernels.sums import PACK, put_sums, read_state
from odelm.models.kernels.tokens import Token, Tokens

plgpu: Any = mosaic_gpu
"""Untyped, because its names and signatures differ between releases of JAX."""
Ref = Any
"""An array that a kernel reads and writes in place."""
Place = tuple[Any, ...]
Places = Callable[[int], list[Place]]
"""Returns, for a row of the batch, the places (name, row, *place) of vectors that were published for it."""


@dataclass
class Program:
    """One of the programs of a kernel, which all run at once, a warpgroup each."""

    layout: Layout
    me: jax.Array
    """int32 (), its number."""
    matrices: dict[str, Ref]
    """Those of `tables.matrices`, in global memory like the next two."""
    vectors: dict[str, Ref]
    """Those of `tables.vectors`."""
    between: dict[str, Ref]
    """The results that phases pass to each other, as in `arrays.exchanged`."""
    keys: Ref
    """(N, B, S, J K) of the memory, and the values; read and written."""
    values: Ref
    near: dict[str, Ref]
    """Shared memory and its barriers, as in `arrays.scratch`."""
    meeting: bool
    """Whether one launch computes all phases; otherwise each is a launch of its own."""
    zero: Any = 0
    """0, hidden from the compiler."""

    @property
    def pieces(self) -> Pieces:
        """This program's pieces of a block's matrices."""
        return Pieces(self.layout, self.me, self.zero, self.matrices, self.vectors["block"], self.near, self.meeting)

    @property
    def marked(self) -> bool:
        """Whether results published within a token have marks."""
        return self.meeting and self.layout.marked

    @property
    def shares_work(self) -> bool:
        """Whether there are other programs to wait for."""
        return self.meeting and self.layout.programs > 1

    def mark(self, token: Token | Tokens, step: jax.Array) -> jax.Array:
        """Returns the mark of results published in a step, or after the last: not 0, and unique within a launch."""
        return token.number * (self.layout.steps + self.layout.several) + step + 1

    def paired(self, name: str) -> bool:
        """Whether results of a name are published by twos."""
        return self.marked and name in self.layout.paired

    def place(self, name: str, *place: Any) -> Ref:
        """Returns where a vector is published, from its name, its row, and its place there, whose last part may be some
        of its numbers."""
        if self.paired(name) and isinstance(place[-1], pl.Slice):
            place = *place[:-1], pl.ds(place[-1].start >> 1, place[-1].size >> 1)
        return self.between[name].at[place]

    def publish(self, x: jax.Array, name: str, row: Any, *place: Any, mark: jax.Array, layout: Any) -> None:
        """Writes a vector of a row of the batch under a name, for the other programs."""
        ref = self.place(name, row, *place)
        if self.paired(name) and name in SUMS:
            put_sums(x, ref, mark)
        elif self.marked:
            (put_paired if self.paired(name) else put_marked)(x, ref, mark, layout)
        else:
            put(x, ref)

    def publish_all(self, x: jax.Array, name: str, *place: Any, mark: jax.Array) -> None:
        """Publishes the result of a product under a name: a vector, or with several rows the vectors in its columns."""
        if not self.layout.several:
            self.publish(x, name, 0, *place, mark=mark, layout=ROW)
        elif self.marked:
            write: Any = put_columns_paired if self.paired(name) else put_columns_marked
            if self.paired(name) and name in SUMS:
                write = partial(put_columns_paired, pack=PACK)
            write(x, self.place(name, 0, *place), prod(self.between[name].shape[1:-1]), self.layout.rows, mark)
        else:
            for row in range(self.layout.rows):
                put(column_of(x, row), self.between[name].at[(row, *place)])

    def receive(self, *places: Place, mark: jax.Array, layout: Any = None, together: bool = False) -> list[jax.Array]:
        """Returns published vectors of one length, from (name, row, *place) each; the one expected last should be the
        last of `places`, unless all are read `together`. Float32, or bfloat16 where they were published by twos and
        rounded. Where sums are read, the first place is the state's."""
        refs = [self.place(*one) for one in places]
        if self.paired(places[-1][0]) and places[-1][0] in SUMS:
            return read_state(refs[0], refs[1:], mark)
        if self.marked:
            read = read_paired if self.paired(places[0][0]) else partial(read_marked, together=together)
            return read(refs, mark, layout)
        return [ref[...] if layout is None else vector(ref, layout) for ref in refs]

    def take_received(
        self, places: Places, finish: Callable[..., jax.Array], size: int, *, mark: jax.Array
    ) -> jax.Array | None:
        """Writes for each row a vector (size,) as the right side of a product: what `finish` makes of the vectors
        published at `places(row)`. Returns what `take` does."""
        if self.layout.several:
            return take_received(self, places, finish, self.inputs(size), mark)
        return self.take_vector(finish(*self.receive(*places(0), mark=mark)), size)

    def take_vector(self, x: jax.Array, size: int) -> jax.Array | None:
        """Writes a vector (size,) as the right side of a product, for a single row. Returns what `take` does."""
        if self.layout.by_warps:
            return put_pairs(x, self.near["pairs"], strided(size))
        self.near["state"].at[pl.ds(0, size)][...] = x
        return self.take(0, size)

    def arrive(self, part: jax.Array) -> None:
        """Signals that this program has done its `part` of a phase, if it has one.

        A program without a part does not delay the others, so what it reads must not change before its next part.
        """
        if self.shares_work:
            with jax.named_scope("arrive"):
                pl.when(part)(lambda: arrive(self.between["arrived"]))

    def wait(self, count: jax.Array) -> None:
        """Waits until programs have arrived `count` times in all. What they wrote before is then visible."""
        if self.shares_work:
            with jax.named_scope("wait"):
                wait(self.between["arrived"], count)

    def meet(self, count: jax.Array) -> jax.Array:
        """Waits until all programs have arrived, and returns how often they have arrived by then."""
        self.arrive(jnp.bool(True))
        self.wait(count + self.layout.programs)
        return count + self.layout.programs

    def has(self, *names: str) -> jax.Array:
        """Whether this program has a piece of any of these maps; with no names, a part in attention; with the name
        "rows", a row of the batch."""
        if not names or names == ("rows",):
            return self.me < participants(self.layout, *names)
        found = [(name, portion) for name in names for portion in range(len(portions(self.layout, name)))]
        return reduce(jnp.logical_or, [self.pieces.has(name, 0, portion) for name, portion in found])

    def with_opaque_numbers(self) -> "Program":
        """Returns this program with its numbers hidden from the compiler.

        Otherwise the compiler computes all addresses that depend on them before the loops, more than there are
        registers for.
        """
        if not self.shares_work:
            return self
        return replace(self, me=opaque(self.me), zero=opaque(jnp.int32(0)))

    def see_stores(self) -> None:
        """Lets the copies that this program starts see what programs stored before they met."""
        if self.shares_work:
            order_copies_after_stores()

    def share(self, count: int, work: Callable[[Any, jax.Array], None]) -> None:
        """Does this program's part of `count` pieces of work: `work(n, piece)` for its n-th."""
        share(count, self.me, self.layout.programs, work)

    def inputs(self, size: int) -> Ref:
        """Returns the right side of a product, transposed: (columns, size)."""
        return self.near["inputs"].at[self.zero, :, pl.ds(0, size)]

    def product(self, accumulate: Callable[[Ref], None]) -> jax.Array:
        """Returns what `accumulate` sums up in an accumulator, float32: (`ROWS`,) where its columns are all equal, or
        parts of int8, in units; with several rows all columns, (`ROWS`, columns)."""

        def summed(acc: Ref) -> jax.Array:
            accumulate(acc)
            return acc[...]

        dtype = jnp.int32 if self.layout.in_bytes else jnp.float32
        sums = pl.run_scoped(summed, plgpu.ACC((ROWS, self.layout.columns), dtype))
        if self.layout.in_bytes:
            return with_columns_added(sums)
        return sums if self.layout.several else jnp.max(sums, axis=1)

    def affine(self, name: str, step: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns a norm's scale and shift (D,), those of a step if one is given."""
        place = ... if step is None else step
        return self.vectors[f"{name}_scale"][place], self.vectors[f"{name}_shift"][place]

    def affine_refs(self, name: str, step: jax.Array | None = None) -> tuple[Ref, Ref]:
        """Returns references to a norm's scale and shift, as in `affine`."""
        scale, shift = self.vectors[f"{name}_scale"], self.vectors[f"{name}_shift"]
        return (scale, shift) if step is None else (scale.at[step], shift.at[step])

    def normalise(self, h: jax.Array, affine: tuple[jax.Array, jax.Array]) -> None:
        """Keeps the normalised state (D,), times the scale, plus the shift, in shared memory."""
        scale, shift = affine
        with jax.named_scope("normalise"):
            self.near["state"].at[pl.ds(0, self.layout.width)][...] = self.normed(h) * scale + shift

    def take_normalised(self, h: jax.Array, affine: tuple[jax.Array, jax.Array]) -> None:
        """Normalises the state (D,), times the scale, plus the shift, and keeps it for `take`; by warps it is written
        as the right side of a product at once."""
        if not self.layout.by_warps:
            self.normalise(h, affine)
            return
        scale, shift = affine
        with jax.named_scope("normalise"):
            self.take_vector(self.normed(h) * scale + shift, self.layout.width)

    def normed(self, h: jax.Array) -> jax.Array:
        """Returns a state (D,) normalised, without scale and shift."""
        if self.layout.norm == "layernorm":
            h = h - jnp.sum(h) / self.layout.width
        return h * lax.rsqrt(jnp.sum(h * h) / self.layout.width + self.layout.eps)

    def take(self, offset: jax.Array | int, size: int) -> jax.Array | None:
        """Writes a slice of the vector kept in shared memory into all columns of the right side of a product. Where
        that is int8, it has three parts of each number, and the value of one unit is returned."""
        if self.layout.in_bytes:
            near = self.near["state"].at[pl.ds(offset, size)], self.inputs(size)
            return put_bytes(*near, self.layout.dtype) * (1 / UNIT)
        x, columns = vector(self.near["state"].at[pl.ds(offset, size)]), self.inputs(size).transpose((1, 0))
        columns[...] = lax.broadcast_in_dim(x.astype(self.layout.dtype), columns.shape, (0,))
        return None

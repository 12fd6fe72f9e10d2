"""Which pieces of a block's matrices a program has, where they are in its shared memory, and when they are copied
there."""

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

from odelm.models.kernels.by_warps import product
from odelm.models.kernels.layout import ROWS, Layout
from odelm.models.kernels.plain import vector
from odelm.models.kernels.portions import portions

plgpu: Any = mosaic_gpu
Ref = Any


@dataclass(frozen=True)
class Pieces:
    """The pieces of one program."""

    layout: Layout
    me: jax.Array
    """int32 (), the number of the program."""
    zero: Any
    """0, hidden from the compiler."""
    matrices: dict[str, Ref]
    blocks: Ref
    """int32 (N,), the block of each step."""
    near: dict[str, Ref]
    """The program's shared memory and its barriers."""
    meeting: bool
    """Whether one launch computes all phases; otherwise each is a launch of its own."""

    def rank(self, name: str, portion: int = 0) -> tuple[jax.Array, int]:
        """Returns the first piece of a map's portion that this program has, below 0 if it cannot have one, and the
        number of pieces from one to the next."""
        of = portions(self.layout, name)[portion]
        return jnp.where(self.me < of.base, -1, lax.rem(self.me - of.base + of.span - of.first, of.span)), of.span

    def has(self, name: str, number: Any, portion: int = 0) -> jax.Array:
        """Whether this program has a `number`-th piece of a map's portion."""
        rank, span = self.rank(name, portion)
        return (rank >= 0) & (rank + number * span < portions(self.layout, name)[portion].pieces)

    def count(self) -> jax.Array:
        """Returns how many pieces this program has of the maps that take turns."""
        rounds = [(name, number) for name in self.layout.turns for number in range(self._rounds(name))]
        return reduce(add, [self.has(*one).astype(jnp.int32) for one in rounds])

    @property
    def _same(self) -> bool:
        """Whether a piece may stay in its place: all steps have one block."""
        return self.meeting and self.matrices["qkv"].shape[0] == 1

    def resident(self) -> jax.Array:
        """Whether this program has only one piece of the maps that take turns, which may stay in its place."""
        return (self.count() == 1) if self._same else jnp.bool(False)

    def awaited(self, name: str, step: jax.Array, portion: int = 0) -> jax.Array:
        """Whether the copy of a piece that is about to be used was started after the last use of its place."""
        if name in self.layout.turns:
            return ~self.resident()
        return jnp.bool(self._replaced(name)) | ((step == 0) & (portion == 0))

    def replaced(self, name: str) -> jax.Array:
        """Whether a piece that has been used makes room for another one during a token."""
        return ~self.resident() if name in self.layout.turns else jnp.bool(self._replaced(name))

    def _replaced(self, name: str) -> bool:
        return not (self._same and self._rounds(name) == 1)

    def _rounds(self, name: str) -> int:
        """Returns how many pieces of a map take turns in one place at most."""
        return portions(self.layout, name)[0].rounds

    def wait(self, name: str, number: Any = 0, portion: int = 0) -> None:
        """Waits for a piece of a map."""
        for _, arrival in self._places(name, number, portion):
            plgpu.barrier_wait(arrival)

    def multiply(self, name: str, acc: Ref, inputs: Ref, number: Any = 0, portion: int = 0) -> None:
        """Multiplies a piece of a map by inputs, (columns, inputs), into an accumulator."""
        for part, (place, _) in enumerate(self._places(name, number, portion)):
            size = place.shape[1]
            plgpu.wgmma(acc, place, inputs.at[:, pl.ds(part * size, size)].transpose((1, 0)))

    def scale(self, name: str, tile: jax.Array, step: jax.Array) -> jax.Array | None:
        """Returns the scale (`ROWS`,) of each output of a tile of a map; None where matrices have none."""
        if not self.layout.in_bytes:
            return None
        return vector(self.matrices[f"{name}_scale"].at[self.blocks[step], pl.ds(tile * ROWS, ROWS)])

    def product(self, name: str, pairs: Ref, number: Any = 0, portion: int = 0) -> jax.Array:
        """Returns a piece of a map times inputs, float32 (`ROWS`,), by the program's warps."""
        places = [place for place, _ in self._places(name, number, portion)]
        return product(places, pairs, self.layout.slice_of(name))

    def fetch(self, name: str, number: Any, step: jax.Array, portion: int = 0) -> None:
        """Starts to copy the `number`-th of this program's pieces of a map's portion, for a step, into its place."""
        splits, length = self.layout.splits(name), self.layout.slice_of(name)
        rank, span = self.rank(name, portion)
        item, block = portions(self.layout, name)[portion].start + rank + number * span, self.blocks[step]
        for part, (place, arrival) in enumerate(self._places(name, number, portion)):
            size = place.shape[1]
            start = lax.rem(item, splits) * length + part * size
            of = (block, pl.ds(item // splits * ROWS, ROWS), pl.ds(start, size))
            plgpu.copy_gmem_to_smem(self.matrices[name].at[of], place, arrival)

    def fetch_first(self, names: tuple[str, ...], step: jax.Array) -> None:
        """Starts to copy the first piece that this program has of these maps."""
        if names:
            lax.cond(
                self.has(names[0], 0),
                lambda: self.fetch(names[0], 0, step),
                lambda: self.fetch_first(names[1:], step),
            )

    def fetch_kept(self) -> None:
        """Copies the pieces that have the places of other maps, and waits for them."""
        found = [
            (number, n) for n, of in enumerate(portions(self.layout, "down")) for number in range(of.kept * of.rounds)
        ]
        for number, n in found:
            pl.when(self.has("down", number, n))(lambda of=(number, n): self.fetch("down", of[0], jnp.int32(0), of[1]))
        for number, n in found:
            pl.when(self.has("down", number, n))(lambda of=(number, n): self.wait("down", *of))

    def fetch_for_token(self) -> None:
        """Starts to copy the piece that has the memory of the readout's ring, which every token uses."""
        for name in self.layout.in_ring:
            pl.when(self.has(name, 0))(lambda name=name: self.fetch(name, 0, jnp.int32(0)))

    def fetch_after(self, name: str, number: Any, step: jax.Array, portion: int = 0) -> None:
        """Starts to copy the piece that is multiplied next after the `number`-th of a map; only one of this map where
        each phase is a launch of its own."""
        turns = self.layout.turns
        names = turns if name in turns else (name,)
        later, following = names[names.index(name) + 1 :], lax.rem(step + 1, self.layout.steps)

        def first() -> None:
            # There is no piece of `out` to copy after the last step, where the readout begins.
            pl.when((following > 0) | (name in turns))(lambda: self.fetch_first(names, following))

        def others() -> None:
            if self.meeting:
                some = reduce(jnp.logical_or, [self.has(one, 0) for one in later], jnp.bool(False))
                lax.cond(some, lambda: self.fetch_first(later, step), first)

        lax.cond(self.has(name, number + 1, portion), lambda: self.fetch(name, number + 1, step, portion), others)

    def drain(self) -> None:
        """Waits for copies that are still running after the last token."""
        pl.when((self.count() > 0) & ~self.resident())(lambda: self.wait(self.layout.turns[0]))
        for name in self.layout.in_ring:
            pl.when(self.has(name, 0))(lambda name=name: self.wait(name))

    def _places(self, name: str, number: Any = 0, portion: int = 0) -> list[tuple[Ref, Ref]]:
        """Returns where the parts of a piece are in shared memory, and the barriers of their copies."""
        layout, matrix, arrivals = self.layout, self.near["matrix"], self.near["arrivals"]
        if portions(layout, name)[portion].kept:
            return [(matrix.at[number], arrivals.at[number])]
        if name in layout.turns:
            return [(matrix.at[self.zero + part], arrivals.at[part]) for part in range(layout.matrix_places)]
        if layout.rounded:
            return [(self.near["out"].at[self.zero], arrivals.at[layout.matrix_places])]
        readout = self.near["readout"]
        return [(readout.at[part], arrivals.at[layout.matrix_places + part]) for part in range(layout.out_parts)]


def share(count: int, rank: jax.Array, span: int, work: Callable[[Any, jax.Array], None]) -> None:
    """Calls `work` for the pieces `rank`, `rank` + `span` .. of `count`, none if the rank is below 0."""
    if count <= span:
        pl.when((rank >= 0) & (rank < count))(lambda: work(0, rank))
        return

    @pl.loop(0, -(-count // span))
    def one(number: jax.Array) -> None:
        piece = number * span + rank
        pl.when((rank >= 0) & (piece < count))(lambda: work(number, piece))

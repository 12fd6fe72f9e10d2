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
from odelm.models.kernels.layout import ROWS, TURNS, Layout
from odelm.models.kernels.plain import vector

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

    def rank(self, name: str) -> tuple[jax.Array, int]:
        """Returns the first piece of a map that this program has, below 0 if it cannot have one, and the number of
        pieces from one to the next."""
        base, first, span = self.layout.owners(name)
        return jnp.where(self.me < base, -1, lax.rem(self.me - base + span - first, span)), span

    def has(self, name: str, number: Any) -> jax.Array:
        """Whether this program has a `number`-th piece of a map."""
        rank, span = self.rank(name)
        return (rank >= 0) & (rank + number * span < self.layout.pieces(name))

    def count(self) -> jax.Array:
        """Returns how many pieces this program has of the maps that take turns."""
        rounds = [(name, number) for name in TURNS for number in range(self.layout.rounds(name))]
        return reduce(add, [self.has(*one).astype(jnp.int32) for one in rounds])

    @property
    def _same(self) -> bool:
        """Whether a piece may stay in its place: all steps have one block."""
        return self.meeting and self.matrices["qkv"].shape[0] == 1

    def resident(self) -> jax.Array:
        """Whether this program has only one piece of the maps that take turns, which may stay in its place."""
        return (self.count() == 1) if self._same else jnp.bool(False)

    def awaited(self, name: str, step: jax.Array) -> jax.Array:
        """Whether the copy of a piece that is about to be used was started after the last use of its place."""
        if name in TURNS:
            return ~self.resident()
        return (step == 0) | (not (self._same and self.layout.rounds(name) == 1))

    def replaced(self, name: str, step: jax.Array) -> jax.Array:
        """Whether a piece that has been used makes room for another one."""
        if name in TURNS:
            return ~self.resident()
        return jnp.bool(not (self._same and self.layout.rounds(name) == 1))

    def wait(self, name: str) -> None:
        """Waits for the piece in the place of a map."""
        for number, _ in enumerate(self._places(name)):
            plgpu.barrier_wait(self.near["arrivals"].at[number if name in TURNS else 1 + number])

    def multiply(self, name: str, acc: Ref, inputs: Ref) -> None:
        """Multiplies the piece in the place of a map by inputs, (columns, inputs), into an accumulator."""
        for number, place in enumerate(self._places(name)):
            size = place.shape[1]
            plgpu.wgmma(acc, place, inputs.at[:, pl.ds(number * size, size)].transpose((1, 0)))

    def scale(self, name: str, tile: jax.Array, step: jax.Array) -> jax.Array | None:
        """Returns the scale (`ROWS`,) of each output of a tile of a map; None where matrices have none."""
        if not self.layout.in_bytes:
            return None
        return vector(self.matrices[f"{name}_scale"].at[self.blocks[step], pl.ds(tile * ROWS, ROWS)])

    def product(self, name: str, pairs: Ref) -> jax.Array:
        """Returns the piece in the place of a map times inputs, float32 (`ROWS`,), by the program's warps."""
        return product(self._places(name), pairs, self.layout.slice_of(name))

    def fetch(self, name: str, number: Any, step: jax.Array) -> None:
        """Starts to copy the `number`-th of this program's pieces of a map, for a step, into its place."""
        splits, length = self.layout.splits(name), self.layout.slice_of(name)
        rank, span = self.rank(name)
        item, block = rank + number * span, self.blocks[step]
        for part, place in enumerate(self._places(name)):
            size = place.shape[1]
            start = lax.rem(item, splits) * length + part * size
            of = (block, pl.ds(item // splits * ROWS, ROWS), pl.ds(start, size))
            arrival = self.near["arrivals"].at[part if name in TURNS else 1 + part]
            plgpu.copy_gmem_to_smem(self.matrices[name].at[of], place, arrival)

    def fetch_first(self, names: tuple[str, ...], step: jax.Array) -> None:
        """Starts to copy the first piece that this program has of these maps."""
        if names:
            lax.cond(
                self.has(names[0], 0),
                lambda: self.fetch(names[0], 0, step),
                lambda: self.fetch_first(names[1:], step),
            )

    def fetch_after(self, name: str, number: Any, step: jax.Array) -> None:
        """Starts to copy the piece that is multiplied next after the `number`-th of a map; only one of this map where
        each phase is a launch of its own."""
        names = TURNS if name in TURNS else (name,)
        later, following = names[names.index(name) + 1 :], lax.rem(step + 1, self.layout.steps)

        def first() -> None:
            # There is no piece of `out` to copy after the last step, where the readout begins.
            pl.when((following > 0) | (name in TURNS))(lambda: self.fetch_first(names, following))

        def others() -> None:
            if self.meeting:
                some = reduce(jnp.logical_or, [self.has(one, 0) for one in later], jnp.bool(False))
                lax.cond(some, lambda: self.fetch_first(later, step), first)

        lax.cond(self.has(name, number + 1), lambda: self.fetch(name, number + 1, step), others)

    def _places(self, name: str) -> list[Ref]:
        """Returns where the parts of a map's pieces are in shared memory."""
        if name in TURNS:
            return [self.near["matrix"].at[self.zero]]
        if self.layout.rounded:
            return [self.near["out"].at[self.zero]]
        return [self.near["readout"].at[slot] for slot in range(self.layout.early, self.layout.ring)]


def share(count: int, rank: jax.Array, span: int, work: Callable[[Any, jax.Array], None]) -> None:
    """Calls `work` for the pieces `rank`, `rank` + `span` .. of `count`, none if the rank is below 0."""
    if count <= span:
        pl.when((rank >= 0) & (rank < count))(lambda: work(0, rank))
        return

    @pl.loop(0, -(-count // span))
    def one(number: jax.Array) -> None:
        piece = number * span + rank
        pl.when((rank >= 0) & (piece < count))(lambda: work(number, piece))

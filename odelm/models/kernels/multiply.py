"""Products with a block's matrices, of which each program has some pieces."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.pieces import share
from odelm.models.kernels.portions import portions
from odelm.models.kernels.program import Program
from odelm.models.kernels.signals import meet_warps

plgpu: Any = mosaic_gpu
Fill = Callable[[jax.Array, int], jax.Array | None]
"""Writes a number of inputs, from an offset on, as the right side of a product; where that is int8, returns the value
of one unit."""
Constants = Callable[[jax.Array], tuple[jax.Array, ...]]
"""Returns the vectors (`ROWS`,) that a tile of `ROWS` outputs needs in the end; they are loaded in the meantime."""
Store = Callable[..., None]
"""Takes the number of a tile, that of a slice of inputs, the sums over it (`ROWS`,), and the tile's constants."""


@dataclass(frozen=True)
class Linear:
    """A linear map of a step's block."""

    name: str
    step: jax.Array
    constants: Constants
    prepare: Callable[[], None]
    """What programs that have a piece do first."""
    fill: Fill
    store: Store


def multiply(program: Program, linear: Linear) -> None:
    """Computes this program's pieces of a linear map, which are in shared memory or being copied.

    As soon as a piece has been used, the copy of the next one of its place is started, unless it stays. Where each
    phase is a launch of its own, it starts the copies of its own pieces.
    """
    pieces, name = program.pieces, linear.name
    for portion, of in enumerate(portions(program.layout, name)):

        def piece(number: Any, n: jax.Array, portion: int = portion, start: int = of.start) -> None:
            _multiply(program, linear, start + n, number, portion)

        if not program.meeting:
            pl.when(pieces.has(name, 0, portion))(lambda of=portion: pieces.fetch(name, 0, linear.step, of))
        share(of.pieces, *pieces.rank(name, portion), piece)


def _multiply(p: Program, linear: Linear, item: jax.Array, number: Any, portion: int) -> None:
    """Computes the `item`-th piece of a linear map, this program's `number`-th of a portion."""
    name, step = linear.name, linear.step
    splits, size = p.layout.splits(name), p.layout.slice_of(name)
    pieces, by_warps, place = p.pieces, p.layout.by_warps, (number, portion)
    given, scale = linear.constants(item // splits), pieces.scale(name, item // splits, step)
    pl.when(number == 0)(linear.prepare)
    with jax.named_scope("fill"):
        unit = linear.fill(lax.rem(item, splits) * size, size)
        if not by_warps:
            plgpu.commit_smem()
    pl.when(pieces.awaited(name, step, portion))(lambda: pieces.wait(name, *place))
    with jax.named_scope("product"):
        if by_warps:
            sums = pieces.product(name, p.near["pairs"], *place)
        else:
            sums = p.product(lambda acc: pieces.multiply(name, acc, p.inputs(size), *place))
        if scale is not None:
            assert unit is not None
            sums = sums * (scale * unit)

    @pl.when(pieces.replaced(name))
    def send_for_next() -> None:
        if by_warps:
            meet_warps()
        pieces.fetch_after(name, number, step, portion)

    with jax.named_scope("store"):
        linear.store(item // splits, lax.rem(item, splits), sums, *given)


def begin_copies(program: Program) -> None:
    """Starts to copy the first piece of every place, and waits for those that stay."""
    pieces, turns = program.pieces, program.layout.turns
    pieces.fetch_first(turns, jnp.int32(0))
    pl.when(pieces.resident())(lambda: pieces.wait(turns[0]))
    pieces.fetch_kept()
    pieces.fetch_for_token()

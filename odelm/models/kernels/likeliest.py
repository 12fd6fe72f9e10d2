"""The readout of a kernel: the likeliest token of the vocabulary, and its probability, without storing the logits."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from odelm.models.kernels.attend import LEAST
from odelm.models.kernels.layout import ROWS
from odelm.models.kernels.program import ROW, Program, Ref

Best = tuple[jax.Array, jax.Array, jax.Array]
"""The largest logit, the first token that has it, and the sum of exp(logit - largest)."""


def send_for_readout(program: Program) -> None:
    """Starts to copy this program's first pieces of the readout."""
    for i in range(program.layout.ring - 1):
        pl.when(i < _pieces(program))(lambda i=i: _fetch(program, jnp.int32(i)))


def read_out(program: Program, state: jax.Array) -> None:
    """Leaves the best token of this program's part of the vocabulary for `choose`, of the last state (D,).

    Its first pieces must be on their way (`send_for_readout`).
    """
    p, layout = program, program.layout
    p.normalise(state, "end")
    p.take(0, p.near["inputs"].at[pl.ds(0, layout.width)])
    plgpu.commit_smem()

    def tile(number: jax.Array, best: Best) -> Best:
        first = (p.me + number * layout.programs) * ROWS
        words = first + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
        logits = jnp.where(words < layout.words, p.product(lambda acc: _add_pieces(p, number, acc)), LEAST)
        top, word, total = best
        here = jnp.max(logits)
        new = jnp.maximum(top, here)
        total = total * jnp.exp(top - new) + jnp.sum(jnp.exp(logits - new))
        return new, jnp.where(here > top, jnp.min(jnp.where(logits == here, words, layout.vocabulary)), word), total

    nothing = jnp.float32(LEAST), jnp.int32(layout.vocabulary), jnp.float32(0)
    found = lax.fori_loop(0, _tiles(p), tile, nothing)
    p.between["best"][p.me], p.between["best_word"][p.me], p.between["sum"][p.me] = found


def choose(program: Program) -> tuple[jax.Array, jax.Array]:
    """Returns the likeliest token of all, the first of equals, and its log-probability, after all programs met."""
    layout, between = program.layout, program.between
    there = plgpu.broadcasted_iota(jnp.int32, (layout.slots,), 0) < layout.programs
    tops = jnp.where(there, between["best"][...], LEAST)
    top = jnp.max(tops)
    words = jnp.where(there, between["best_word"][...], layout.vocabulary)
    word = jnp.min(jnp.where(tops == top, words, layout.vocabulary))
    total = jnp.sum(jnp.where(there, between["sum"][...], 0.0) * jnp.exp(tops - top))
    return word, -jnp.log(total)


def _tiles(program: Program) -> jax.Array:
    return pl.cdiv(program.layout.vocabulary // ROWS - program.me, program.layout.programs)


def _parts(program: Program) -> int:
    return program.layout.width // program.layout.ring_slice


def _pieces(program: Program) -> jax.Array:
    return _tiles(program) * _parts(program)


def _fetch(program: Program, piece: jax.Array) -> None:
    layout, near, parts = program.layout, program.near, _parts(program)
    tile, part = program.me + piece // parts * layout.programs, lax.rem(piece, parts)
    here = (pl.ds(tile * ROWS, ROWS), pl.ds(part * layout.ring_slice, layout.ring_slice))
    slot = lax.rem(piece, layout.ring)
    plgpu.copy_gmem_to_smem(
        program.matrices["readout"].at[here], near["readout"].at[slot], near["readout_arrival"].at[slot]
    )


def _add_pieces(program: Program, tile: jax.Array, acc: Ref) -> None:
    """Multiplies the pieces of a tile by the state, and sends for those that follow."""
    layout, near, parts = program.layout, program.near, _parts(program)
    for part in range(parts):
        piece = tile * parts + part
        slot, ahead = lax.rem(piece, layout.ring), piece + layout.ring - 1
        plgpu.barrier_wait(near["readout_arrival"].at[slot])
        inputs = near["inputs"].at[pl.ds(part * layout.ring_slice, layout.ring_slice)]
        plgpu.wgmma(acc, near["readout"].at[slot], inputs)
        plgpu.wgmma_wait(0)
        pl.when(ahead < _pieces(program))(lambda ahead=ahead: _fetch(program, ahead))

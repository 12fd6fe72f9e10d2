"""The readout of rows rounded to int8: half of the memory traffic, and the same token as from the rows themselves.

The rounded rows give each logit up to an error for which the tables have a bound, and so the least and the most that a
word's score can be. No word whose most is below another word's least can be the best. The others, a few in all, are
computed again from the rows as the model has them, and the best of these is the best of all. The sum of exponentials
for the log-probability is that of the rounded logits, except for the chosen word, whose own logit is exact
(`choice.choose`).

Each number of the state x becomes three of int8 (`odelm.models.kernels.in_bytes`). So x is accurate to sqrt(D) / UNIT,
less than 2^-15 of its length at the widest, 1,536, and a sum of float32 in any order to 2^-13 of |row| |x|:
`tables.ROUNDING` is above both together. A score is logit / temperature + noise, and rounding keeps the order of two
scores, so that the score of the most that a logit can be is the most that its score can be.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.attend import LEAST
from odelm.models.kernels.choice import add_pieces, empty, leave, noise, tiles
from odelm.models.kernels.in_bytes import UNIT, put_bytes, with_columns_added
from odelm.models.kernels.layout import COLUMNS, ROWS
from odelm.models.kernels.marked import ROW, strided
from odelm.models.kernels.plain import vector
from odelm.models.kernels.program import Program, Ref
from odelm.models.kernels.signals import highest, raise_to

plgpu: Any = mosaic_gpu


def read_out_rounded(
    program: Program, state: jax.Array, affine: tuple[jax.Array, jax.Array], number: jax.Array
) -> None:
    """Does what `choice.read_out` does, where the layout is `rounded`."""
    p, layout = program, program.layout
    p.normalise(state, affine)
    length = put_bytes(p.near["state"].at[pl.ds(0, layout.width)], _inputs(p), layout.dtype)
    p.near["most"][...] = plgpu.layout_cast(jnp.full(layout.kept_words, jnp.float32(LEAST)), strided(layout.kept_words))
    plgpu.commit_smem()

    def tile(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        bound, top, total = carry
        first = (p.me + n * layout.programs) * ROWS
        words, place = first + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW), pl.ds(n * ROWS, ROWS)
        scale, error = (vector(p.matrices[f"row_{name}"].at[pl.ds(first, ROWS)]) for name in ("scale", "error"))
        bound = _highest(p, bound, number)
        noises = noise(p, words, number) if layout.sampled else None
        with jax.named_scope("product"):
            its = _product(p, n) * (scale * (length / UNIT))
        its = jnp.where(words < layout.words, its, LEAST)
        margin = error * length
        least, most = (_score(p, its + by, noises) for by in (-margin, margin))
        there = (words < layout.words) & (least > LEAST)  # NaN is not above LEAST
        p.near["most"].at[place][...] = jnp.where(there, most, LEAST)
        p.near["logits"].at[place][...] = its
        if noises is not None:
            p.near["noise"].at[place][...] = noises
        bound = jnp.max(jnp.maximum(jnp.where(there, least, LEAST), bound))
        _raise(p, bound, number)
        new = jnp.maximum(top, its)
        return bound, new, total * jnp.exp(top - new) + jnp.exp(its - new)

    floor, _, nothing = empty(p)
    bound, top, total = lax.fori_loop(0, tiles(p), tile, (jnp.float32(LEAST), floor, nothing))
    most = jnp.max(top)
    total = jnp.sum(total * jnp.exp(top - most))
    with jax.named_scope("recheck"):
        score, word, logit, its = _best(p, bound, number)
    leave(p, number, score, word, logit, most, total)
    p.between["best_rounded"][lax.rem(number, 2), p.me] = its


def _best(p: Program, bound: jax.Array, number: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the best score of this program's words, the first word that has it, its logit, and its rounded logit,
    among the words that may be the best of all: those whose most is not below a bound."""
    layout, count = p.layout, p.layout.kept_words
    state = p.near["state"][pl.ds(0, layout.width)]

    def following(place: jax.Array, bound: jax.Array) -> jax.Array:
        most = plgpu.load(p.near["most"], layout=strided(count), optimized=False)
        places = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=strided(count))
        maybe = (places > place) & (most >= bound) & (most > LEAST)
        return jnp.min(jnp.where(maybe, places, count))

    def one(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        place, bound, *best = carry
        word = (p.me + place // ROWS * layout.programs) * ROWS + lax.rem(place, ROWS)
        row = plgpu.load(p.matrices["rows"].at[word], layout=strided(layout.width), optimized=False)
        bound = _highest(p, bound, number)
        its, noises = p.near["logits"][place], p.near["noise"][place] if layout.sampled else None
        logit = jnp.sum(row.astype(jnp.float32) * state)
        if layout.in_bytes:
            logit = logit * p.matrices["row_scale"][word]
        score = _score(p, logit, noises)
        bound = jnp.where(score > bound, score, bound)
        _raise(p, bound, number)
        better = score > best[0]
        found = (jnp.where(better, *pair) for pair in zip((score, word, logit, its), best, strict=True))
        return following(place, bound), bound, *found

    none = jnp.float32(LEAST), jnp.int32(layout.vocabulary), jnp.float32(LEAST), jnp.float32(LEAST)
    start = following(jnp.int32(-1), bound), bound, *none
    _, _, *best = lax.while_loop(lambda carry: carry[0] < count, one, start)
    return tuple(best)


def _inputs(p: Program) -> Ref:
    """Returns the right side of the readout's product, (`COLUMNS`, width): that of the blocks' if it is int8 too."""
    return p.inputs(p.layout.width) if p.layout.in_bytes else p.near["rounded_inputs"]


def _product(p: Program, tile: jax.Array) -> jax.Array:
    """Returns (`ROWS`,) float32, the product of a tile's rows of int8 with the state, in its units."""

    def summed(acc: Ref) -> jax.Array:
        # A place more is empty while a piece is waited for: too much of a short ring.
        add_pieces(p, tile, acc, _inputs(p), behind=int(p.layout.ring > 3))
        return acc[...]

    return with_columns_added(pl.run_scoped(summed, plgpu.ACC((ROWS, COLUMNS), jnp.int32)))


def _score(p: Program, logits: jax.Array, noises: jax.Array | None) -> jax.Array:
    return logits if noises is None else logits / p.vectors["temperature"][0] + noises


def _highest(p: Program, bound: jax.Array, number: jax.Array) -> jax.Array:
    """Returns the higher of a bound and the value to which programs have raised theirs by now; warps may see different
    ones."""
    return jnp.maximum(bound, highest(p.between["bound"].at[0], number + 1, LEAST)) if p.shares_work else bound


def _raise(p: Program, bound: jax.Array, number: jax.Array) -> None:
    if p.shares_work:
        raise_to(bound, p.between["bound"].at[0], number + 1)

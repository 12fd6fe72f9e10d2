"""The readout of a kernel: the next token of the vocabulary, and its probability, without storing the logits.

A token is drawn as `jax.random.categorical` does it: the largest of logit / temperature + noise, which has Gumbel's
distribution. The noise is that of `jax.random.gumbel`, number for number.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from odelm.models.kernels.attend import LEAST
from odelm.models.kernels.layout import ROWS
from odelm.models.kernels.marked import ROW
from odelm.models.kernels.plain import vector
from odelm.models.kernels.program import Program, Ref

Best = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
"""The best score, the first token that has it and its logit; the largest logit, and the sum of exp(logit - largest)."""


def send_for_readout(program: Program, *, early: bool) -> None:
    """Starts to copy this program's first pieces of the readout: if `early`, those whose places are free from the
    beginning, otherwise the others, which need the memory of a piece of `in_ring`, once all warps have used it (Pallas
    lets them meet before each copy)."""
    layout = program.layout
    for i in range(layout.early) if early else range(layout.early, layout.ring):
        pl.when(i < _pieces(program))(lambda i=i: _fetch(program, jnp.int32(i)))


def drain_readout(program: Program) -> None:
    """Waits for the pieces whose copies were started early."""
    for i in range(program.layout.early):
        arrival = program.near["readout_arrival"].at[_slot(program, i)]
        pl.when(i < _pieces(program))(lambda arrival=arrival: plgpu.barrier_wait(arrival))


def read_out(program: Program, state: jax.Array, affine: tuple[jax.Array, jax.Array], number: jax.Array) -> None:
    """Publishes for `choose` the best token of this program's part of the vocabulary, given the last state (D,) of the
    `number`-th token and the scale and shift of the final norm.

    The copies of its first pieces must have been started (`send_for_readout`).
    """
    p, layout = program, program.layout
    p.normalise(state, affine)
    p.take(0, layout.width)
    plgpu.commit_smem()
    inputs = p.inputs(layout.width)

    def tile(n: jax.Array, best: Best) -> Best:
        first = (p.me + n * layout.programs) * ROWS
        words = first + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
        with jax.named_scope("product"):
            its = jnp.where(words < layout.words, p.product(lambda acc: add_pieces(p, n, acc, inputs)), LEAST)
        scores = its
        if layout.sampled:
            scores = its / p.vectors["temperature"][0] + noise(p, words, number)
            scores = jnp.where(words < layout.words, scores, LEAST)
        if layout.filtered:
            p.near["logits"].at[n][...] = its
            p.near["scores"].at[n][...] = scores
        score, word, logit, top, total = best
        new, better = jnp.maximum(top, its), scores > score
        total = total * jnp.exp(top - new) + jnp.exp(its - new)
        score, word, logit = (jnp.where(better, *one) for one in ((scores, score), (words, word), (its, logit)))
        return score, word, logit, new, total

    least, none, nothing = empty(p)
    score, word, logit, top, total = lax.fori_loop(0, tiles(p), tile, (least, none, least, least, nothing))
    most = jnp.max(top)
    leave(p, number, *_best_of(p, score, word, logit), most, jnp.sum(total * jnp.exp(top - most)))


def settle(program: Program, number: jax.Array, met: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the `number`-th token and its log-probability, and how often programs have arrived by then.

    It is the token with the best score among the `top_k` likeliest: the best of all, if fewer than `top_k` tokens are
    likelier; if not, neither that one nor any less likely token can be chosen, and the best of the others is tried
    next. Each such round takes two barriers of all programs. Tokens as likely as the last of the `top_k` count among
    them.
    """
    p = program
    word, logit, logprob = choose(p, number)
    if not p.layout.filtered:
        return word, logprob, met

    def again(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        _, floor, _, _, met = carry
        leave(p, number, *_best_above(p, floor))
        met = p.meet(met)
        word, logit, logprob = choose(p, number)
        count, met = _likelier(p, logit, met)
        return word, logit, logprob, count, met

    kept = p.vectors["top_k"][0].astype(jnp.float32)
    count, met = _likelier(p, logit, met)
    start = word, logit, logprob, count, met
    word, _, logprob, _, met = lax.while_loop(lambda carry: carry[3] >= kept, again, start)
    return word, logprob, met


def choose(program: Program, number: jax.Array, row: Any = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the `number`-th token of a row, which is the best of all programs' tokens (the first of equals), its
    logit and its log-probability, after all programs met."""
    layout, places = program.layout, (program.layout.slots,)
    if layout.several:
        there = plgpu.broadcasted_iota(jnp.int32, places, 0, layout=ROW) < layout.programs
        found = [vector(program.between[name].at[lax.rem(number, 2), :, row]) for name in BEST]
    else:
        there = plgpu.broadcasted_iota(jnp.int32, places, 0) < layout.programs
        found = [program.between[name][lax.rem(number, 2)] for name in BEST]
    scores, words, logits, tops, sums = found
    scores, tops = jnp.where(there, scores, LEAST), jnp.where(there, tops, LEAST)
    word = jnp.min(jnp.where(scores == jnp.max(scores), jnp.where(there, words, layout.vocabulary), layout.vocabulary))
    logit = jnp.max(jnp.where(there, jnp.where(words == word, logits, LEAST), LEAST))
    top = jnp.max(tops)
    total = jnp.sum(jnp.where(there, sums, 0.0) * jnp.exp(tops - top))
    if layout.rounded:  # the sum has the chosen word's rounded logit
        rounded = program.between["best_rounded"][lax.rem(number, 2)]
        its = jnp.exp(logit - top)
        total = total - jnp.exp(jnp.max(jnp.where(there & (words == word), rounded, LEAST)) - top)
        total = jnp.maximum(total, 0.0) + its
    # Where no logit is a number, this is any token that has an embedding.
    return jnp.minimum(word, layout.words - 1), logit, logit - top - jnp.log(total)


def empty(p: Program) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the initial values of a search over tiles, (`ROWS`,) each: the least score, no word, and 0."""
    values = jnp.float32(LEAST), jnp.int32(p.layout.vocabulary), jnp.float32(0)
    least, none, nothing = (plgpu.layout_cast(jnp.full((ROWS,), value), ROW) for value in values)
    return least, none, nothing


def _best_of(p: Program, score: jax.Array, word: jax.Array, logit: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the best score of all rows, the first word that has it, and that word's logit."""
    best = jnp.max(score)
    word = jnp.min(jnp.where(score == best, word, p.layout.vocabulary))
    return best, word, jnp.max(jnp.where(score == best, logit, LEAST))


def _best_above(p: Program, floor: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the best score, word and logit among this program's tokens whose logit is above a floor."""

    def tile(n: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        words = (p.me + n * p.layout.programs) * ROWS + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
        logits, scores = (vector(p.near[name].at[n]) for name in ("logits", "scores"))
        scores = jnp.where(logits > floor, scores, LEAST)
        better = scores > best[0]
        return tuple(jnp.where(better, *one) for one in zip((scores, words, logits), best, strict=True))

    least, none, _ = empty(p)
    return _best_of(p, *lax.fori_loop(0, tiles(p), tile, (least, none, least)))


def _likelier(p: Program, logit: jax.Array, met: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns how many tokens have a larger logit, float32 (), and how often programs have arrived by then."""

    def tile(n: jax.Array, count: jax.Array) -> jax.Array:
        return count + (vector(p.near["logits"].at[n]) > logit).astype(jnp.float32)

    p.between["likelier"][p.me] = jnp.sum(lax.fori_loop(0, tiles(p), tile, empty(p)[2]))
    met = p.meet(met)
    there = plgpu.broadcasted_iota(jnp.int32, (p.layout.slots,), 0) < p.layout.programs
    return jnp.sum(jnp.where(there, p.between["likelier"][...], 0.0)), met


def leave(p: Program, number: jax.Array, *values: jax.Array) -> None:
    """Publishes `values`, the first ones of `BEST`, for `choose`."""
    for name, value in zip(BEST, values, strict=False):
        p.between[name][lax.rem(number, 2), p.me] = value


def noise(program: Program, places: jax.Array, number: jax.Array) -> jax.Array:
    """Returns the noise that is added to scores where the `number`-th token is drawn, for the words at `places` among
    all words of all rows."""
    keys = program.vectors["keys"]
    bits = _random_bits(keys[number, 0], keys[number, 1], places.astype(jnp.uint32))
    ones = (bits >> 9) | jnp.uint32(0x3F800000)  # floats from 1 up to 2
    uniform = jnp.maximum(lax.bitcast_convert_type(ones, jnp.float32) - 1.0 + TINY, TINY)
    return -jnp.log(-jnp.log(uniform))


def _random_bits(key0: jax.Array, key1: jax.Array, places: jax.Array) -> jax.Array:
    """Returns the bits that JAX draws for places of an array, uint32: Threefry with 20 rounds (Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3") of a counter, both of its words folded into one."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x, y = jnp.zeros_like(places) + keys[0], places + keys[1]
    for group in range(5):
        for turn in ROTATIONS[group % 2]:
            x = x + y
            y = (y << turn) | (y >> (32 - turn))
            y = x ^ y
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x ^ y


ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
TINY = float(jnp.finfo(jnp.float32).tiny)
BEST = ("best", "best_word", "best_logit", "top_logit", "sum")
"""The names under which a program publishes its `Best`."""


def tiles(program: Program) -> jax.Array:
    return pl.cdiv(program.layout.vocabulary // ROWS - program.me, program.layout.programs)


def _parts(program: Program) -> int:
    return program.layout.width // program.layout.ring_slice


def _pieces(program: Program) -> jax.Array:
    return tiles(program) * _parts(program)


def _piece(program: Program, number: jax.Array) -> Ref:
    """Returns where one of this program's pieces of the readout is in global memory."""
    parts = _parts(program)
    tile, part = program.me + number // parts * program.layout.programs, lax.rem(number, parts)
    return program.matrices["readout"].at[pl.ds((tile * parts + part) * ROWS, ROWS)]


def _slot(program: Program, piece: Any) -> Any:
    """Returns the place of a piece in the ring; the first places are the last that become free."""
    return lax.rem(jnp.int32(piece + program.layout.out_places), program.layout.ring)


def _fetch(program: Program, piece: jax.Array) -> None:
    near, slot = program.near, _slot(program, piece)
    plgpu.copy_gmem_to_smem(_piece(program, piece), near["readout"].at[slot], near["readout_arrival"].at[slot])


def add_pieces(program: Program, tile: jax.Array, acc: Ref, state: Ref, *, behind: int = 0) -> None:
    """Multiplies the pieces of a tile by the state, (columns, width), and starts to copy another piece as soon as the
    place of each is free: when no more than `behind` later products are still running."""
    layout, near, parts = program.layout, program.near, _parts(program)
    for step in range(parts + behind):
        if step < parts:
            slot = _slot(program, tile * parts + step)
            plgpu.barrier_wait(near["readout_arrival"].at[slot])
            inputs = state.at[:, pl.ds(step * layout.ring_slice, layout.ring_slice)]
            plgpu.wgmma(acc, near["readout"].at[slot], inputs.transpose((1, 0)))
        if step >= behind:
            plgpu.wgmma_wait(behind if step < parts else 0)
            following = tile * parts + step - behind + layout.ring
            pl.when(following < _pieces(program))(lambda piece=following: _fetch(program, piece))

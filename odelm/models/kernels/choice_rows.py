"""The readout of several rows at once: the matrix is read once, and its product's columns are the rows' logits."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.attend import LEAST
from odelm.models.kernels.choice import BEST, Best, add_pieces, choose, noise, tiles
from odelm.models.kernels.layout import ROWS
from odelm.models.kernels.marked import COLUMN
from odelm.models.kernels.phases import take_normed
from odelm.models.kernels.plain import put, vector
from odelm.models.kernels.program import Program, Ref
from odelm.models.kernels.tokens import TEXTS, Tokens

plgpu: Any = mosaic_gpu
DONE = TEXTS.index("done")


def read_out_rows(program: Program, token: Tokens, end: jax.Array) -> None:
    """Publishes for `choose_rows` the best token of each row in this program's part of the vocabulary, given the
    normalised last states.

    A row that has ended gets the token `end`, with its log-probability. The copies of the first pieces of the readout
    must have been started.
    """
    p, layout = program, program.layout
    take_normed(p, token, jnp.int32(layout.steps), 0)
    plgpu.commit_smem()
    inputs, shape = p.inputs(layout.width), (ROWS, layout.columns)
    ended = lax.broadcast_in_dim(vector(p.between["texts"].at[DONE], COLUMN) > 0, shape, (1,))

    def tile(n: jax.Array, best: Best) -> Best:
        words = (p.me + n * layout.programs) * ROWS + _indices(shape, 0)
        with jax.named_scope("product"):
            its = jnp.where(words < layout.words, p.product(lambda acc: add_pieces(p, n, acc, inputs)), LEAST)
        scores = its
        if layout.sampled:
            scores = its / p.vectors["temperature"][0] + noise(
                p, words + _indices(shape, 1) * layout.words, token.number
            )
            scores = jnp.where(words < layout.words, scores, LEAST)
        scores = jnp.where(ended, jnp.where(words == jnp.maximum(end, 0), 0.0, LEAST), scores)
        score, word, logit, top, total = best
        new, better = jnp.maximum(top, its), scores > score
        total = total * jnp.exp(top - new) + jnp.exp(its - new)
        score, word, logit = (jnp.where(better, *one) for one in ((scores, score), (words, word), (its, logit)))
        return score, word, logit, new, total

    values = jnp.float32(LEAST), jnp.int32(layout.vocabulary), jnp.float32(0)
    least, none, nothing = (plgpu.layout_cast(jnp.full(shape, x), plgpu.Layout.WGMMA) for x in values)
    _leave(p, token.number, lax.fori_loop(0, tiles(p), tile, (least, none, least, least, nothing)))


def choose_rows(program: Program, token: Tokens, end: jax.Array, tokens: Ref, logprobs: Ref) -> None:
    """Writes the next token of each row that this program has, and updates the row's `TEXTS`, after all programs
    met."""
    p, number, texts = program, token.number, program.between["texts"]

    def work(n: Any, row: jax.Array) -> None:
        del n
        found, _, logprob = choose(p, number, row)
        ended = texts[DONE, row] > 0
        word = jnp.where(ended, end, found)
        tokens[row, number], logprobs[row, number] = word, logprob
        texts[TEXTS.index("word"), row] = jnp.maximum(word, 0)
        texts[DONE, row] = (ended | (word == end)).astype(jnp.int32)

    p.share(p.layout.rows, work)


def all_ended(program: Program) -> jax.Array:
    """Whether all rows have ended."""
    return reduce(jnp.logical_and, [program.between["texts"][DONE, row] > 0 for row in range(program.layout.rows)])


def _leave(p: Program, number: jax.Array, best: Best) -> None:
    """Publishes the best of each column for `choose`."""
    score, word, logit, top, total = best

    def everywhere(x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x, score.shape, (1,))

    most = jnp.max(score, axis=0)
    first = jnp.min(jnp.where(score == everywhere(most), word, p.layout.vocabulary), axis=0)
    its = jnp.max(jnp.where(word == everywhere(first), logit, LEAST), axis=0)
    highest = jnp.max(top, axis=0)
    total = jnp.sum(total * jnp.exp(top - everywhere(highest)), axis=0)
    for name, x in zip(BEST, (most, first, its, highest, total), strict=True):
        put(x, p.between[name].at[lax.rem(number, 2), p.me])


def _indices(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

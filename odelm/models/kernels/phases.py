"""The phases of a depth step, between which all programs meet: a state goes in, and the sums that move it come out.

With parallel branches there are three, since both branches read the same state: into both, attention, out of both.
Otherwise there are five.
"""

import math
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from odelm.models.kernels.attend import attend
from odelm.models.kernels.layout import ROWS, Layout
from odelm.models.kernels.program import Program, Token, put, vector

Step = jax.Array
"""int32 (), the number of an evaluation of a block."""
Phase = Callable[[Program, Token, Step], Any]


def phases_of(layout: Layout) -> tuple[Phase, ...]:
    """Returns the phases of a step, in turn."""
    if layout.parallel:
        return _enter_both, attend, _leave_both
    return enter, attend, leave_attention, feed, leave_feedforward


def enter(program: Program, token: Token, step: Step) -> jax.Array:
    """Computes queries, keys and values from the state that enters a step, first of all the token's embedding.

    Returns that state (D,). Each is stored twice, so that a read from the middle has the halves of a head swapped.
    """
    p, K = program, program.layout.head_size

    def embedded() -> jax.Array:
        return p.matrices["embedding"][token.word] + p.vectors["position"][token.position]

    state = lax.cond(step == 0, embedded, lambda: moved(p, step - 1))

    @pl.when(p.me == 0)
    def keep_state() -> None:
        put(state, p.between["state"].at[lax.rem(step, 2)])

    p.normalise(state, "norm1", step)

    def store(tile: jax.Array, part: jax.Array, y: jax.Array) -> None:
        head, at = tile // (K // ROWS), lax.rem(tile, K // ROWS) * ROWS
        for place in (at, K + at):
            put(y, p.between["qkv"].at[part, head, pl.ds(place, ROWS)])

    p.multiply("qkv", step, p.take, store)
    return state


def leave_attention(program: Program, token: Token, step: Step) -> None:
    """Multiplies the averaged values of all heads by the output matrix of attention."""
    del token
    p, K, C = program, program.layout.head_size, program.layout.chunk_splits

    def averaged(head: jax.Array, start: jax.Array) -> jax.Array:
        """Returns `ROWS` of a head's values, averaged over the places that the programs shared."""
        tops = [p.between["top"][head, c] for c in range(C)]
        top = reduce(jnp.maximum, tops)
        factors = [jnp.exp(one - top) for one in tops]
        total = reduce(add, [factor * p.between["total"][head, c] for c, factor in enumerate(factors)])
        parts = [vector(p.between["context"].at[c, head, pl.ds(start, ROWS)]) for c in range(C)]
        return reduce(add, [part * (factor / total) for part, factor in zip(parts, factors, strict=True)])

    def fill(offset: jax.Array, inputs: jax.Array) -> None:
        for at in range(0, inputs.shape[1], ROWS):  # a head has one or more of them
            head, start = (offset + at) // K, lax.rem(offset + at, K)
            p.spread(averaged(head, start), inputs.at[:, pl.ds(at, ROWS)])

    p.multiply("out", step, fill, lambda tile, part, y: _put(p, "out", tile, part, y))


def feed(program: Program, token: Token, step: Step) -> None:
    """Computes the hidden units before their activation."""
    del token
    p = program
    p.normalise(p.between["state"][lax.rem(step, 2)] + attended(p, step), "norm2", step)
    _feed(p, step)


def leave_feedforward(program: Program, token: Token, step: Step) -> None:
    """Multiplies the hidden units by the output matrix of the feed-forward branch."""
    del token
    p, F = program, program.layout.hidden

    def before(offset: jax.Array, size: int) -> jax.Array:
        place = pl.ds(offset, size)
        slices = range(p.between["up"].shape[0])
        return reduce(add, [vector(p.between["up"].at[i, place]) for i in slices]) + vector(
            p.vectors["up_bias"].at[step, place]
        )

    def fill(offset: jax.Array, inputs: jax.Array) -> None:
        size = inputs.shape[1]
        if p.layout.activation == "swiglu":
            x = activated(before(offset, size), "silu") * before(F + offset, size)
        else:
            x = activated(before(offset, size), p.layout.activation)
        p.spread(x * vector(p.vectors["hidden_scale"].at[step, pl.ds(offset, size)]), inputs)

    p.multiply("down", step, fill, lambda tile, part, y: _put(p, "down", tile, part, y))


def moved(program: Program, step: Step) -> jax.Array:
    """Returns the state (D,) after a step whose phases are done."""
    p = program
    fed = p.vectors["gate2"][step] * p.summed("down") + p.vectors["down_bias"][step]
    return p.between["state"][lax.rem(step, 2)] + p.vectors["size"][step] * (attended(p, step) + fed)


def attended(program: Program, step: Step) -> jax.Array:
    """Returns what the attention branch adds (D,), for a step of size 1."""
    return program.vectors["gate1"][step] * program.summed("out") + program.vectors["out_bias"][step]


def activated(x: jax.Array, name: str) -> jax.Array:
    """Applies an activation of one argument, by the operations that a kernel has."""
    match name:
        case "gelu":
            return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))
        case "gelu_tanh":
            return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        case "relu":
            return jnp.maximum(x, 0.0)
        case "relu2":
            return jnp.square(jnp.maximum(x, 0.0))
        case "silu":
            return x / (1 + jnp.exp(-x))
    raise ValueError(f"activation is {name!r}")


def _enter_both(program: Program, token: Token, step: Step) -> None:
    state = enter(program, token, step)
    program.normalise(state, "norm2", step)
    _feed(program, step)


def _leave_both(program: Program, token: Token, step: Step) -> None:
    leave_attention(program, token, step)
    leave_feedforward(program, token, step)


def _feed(program: Program, step: Step) -> None:
    program.multiply("up", step, program.take, lambda tile, part, y: _put(program, "up", tile, part, y))


def _put(program: Program, name: str, tile: jax.Array, part: jax.Array, y: jax.Array) -> None:
    put(y, program.between[name].at[part, pl.ds(tile * ROWS, ROWS)])

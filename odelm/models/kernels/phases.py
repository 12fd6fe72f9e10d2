"""The phases of a depth step, each of which reads what others left in it: a state goes in, and what moves it comes out.

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
from odelm.models.kernels.marked import ROW, strided
from odelm.models.kernels.program import Fill, Program, Token, put, vector

Step = jax.Array
"""int32 (), the number of an evaluation of a block."""
Phase = Callable[[Program, Token, Step], Any]


def phases_of(layout: Layout) -> dict[Phase, tuple[str, ...]]:
    """Returns the phases of a step, in turn, and the maps of each."""
    if layout.parallel:
        return {_enter_both: ("qkv", "up"), attend: (), _leave_both: ("out", "down")}
    maps = ("qkv",), (), ("out",), ("up",), ("down",)
    return dict(zip((enter, attend, leave_attention, feed, leave_feedforward), maps, strict=True))


def enter(program: Program, token: Token, step: Step) -> None:
    """Computes queries, divided by the root of a head's size, keys and values from the state that enters a step, first
    of all the token's embedding. It keeps that state, and the keys and values in the memory."""
    p, layout = program, program.layout
    H, J, K = layout.heads, layout.kv_heads, layout.head_size

    def prepare() -> None:
        affine = p.affine("norm1", step)
        state = entering(p, token, step)
        kept = dict(mark=p.mark(token, step), layout=strided(p.layout.width))
        pl.when(p.me == 0)(lambda: p.publish(state, "state", lax.rem(step, 2), **kept))
        p.normalise(state, affine)

    def constants(head: jax.Array) -> tuple[jax.Array, ...]:
        places = [p.vectors[f"qkv_{of}"].at[step, head] for of in ("bias", "scale")]
        if layout.qk_norm:
            places += [p.vectors[f"{name}_{of}"].at[step] for of in ("scale", "shift") for name in ("query", "key")]
        if layout.rotary:
            places += [p.vectors[of].at[token.position] for of in ("cos", "sin")]
        return tuple(map(vector, places))

    def store(head: jax.Array, part: jax.Array, y: jax.Array, bias: jax.Array, scale: jax.Array, *others: Any) -> None:
        del part
        y = (y + bias) * scale
        x = lax.cond(head < H + J, lambda: _placed(p, y, others, is_query=head < H), lambda: y)
        p.publish(x, "qkv", head, mark=p.mark(token, step), layout=ROW)
        for first, memory in ((H, p.keys), (H + J, p.values)):

            @pl.when((head >= first) & (head < first + J))
            def keep_new(first: int = first, memory: Any = memory) -> None:
                put(x.astype(layout.dtype), memory.at[step, token.place, pl.ds((head - first) * K, K)])

    p.multiply("qkv", step, constants, prepare, p.take, store)


def _placed(p: Program, x: jax.Array, given: tuple[jax.Array, ...], *, is_query: jax.Array) -> jax.Array:
    """Returns a query or key (K,), normalised and turned by its position; the query divided by the root of its size.

    The constants are the scales of queries and of keys, their shifts, cosines and sines, as far as the layout has them.
    """
    layout, K = p.layout, p.layout.head_size
    share = is_query.astype(jnp.float32)
    if layout.qk_norm:
        scale, shift = (query * share + key * (1 - share) for query, key in (given[:2], given[2:4]))
        mean = jnp.sum(x) / K if layout.norm == "layernorm" else 0.0
        root = lax.rsqrt(jnp.sum((x - mean) * (x - mean)) / K + layout.eps)
        x = (x - mean) * root * scale + shift
    if layout.rotary:
        cos, sin = given[-2:]
        x = x * cos + p.turned(x) * sin
    return x * jnp.where(is_query, K**-0.5, 1.0)


def leave_attention(program: Program, token: Token, step: Step) -> None:
    """Multiplies the averaged values of all heads by the output matrix of attention."""
    p, C = program, program.layout.chunk_splits

    def fill(offset: jax.Array, inputs: jax.Array) -> None:
        place = pl.ds(offset, inputs.shape[1])
        places = [(name, c, place) for name in ("context", "weight") for c in range(C)]
        found = p.receive(*places, mark=p.mark(token, step))
        parts, weights = found[:C], found[C:]
        top = reduce(jnp.maximum, weights)
        factors = [jnp.exp(one - top) for one in weights]
        averaged = reduce(add, [part * factor for part, factor in zip(parts, factors, strict=True)])
        p.near["state"].at[pl.ds(0, inputs.shape[1])][...] = averaged / reduce(add, factors)
        p.take(0, inputs)

    _leave(p, "out", "1", token, step, fill)


def feed(program: Program, token: Token, step: Step) -> None:
    """Computes the hidden units, with their activation where each is made of one number."""
    p = program

    def prepare() -> None:
        affine = p.affine("norm2", step)
        if p.layout.parallel:
            state = entering(p, token, step)
        else:
            state, *moves = p.receive(*_state(p, step, "out"), mark=p.mark(token, step))
            state = state + reduce(add, moves)
        p.normalise(state, affine)

    layout, tiles = p.layout, p.layout.hidden // ROWS

    def constants(tile: jax.Array) -> tuple[jax.Array, ...]:
        bias = vector(p.vectors["up_bias"].at[step, pl.ds(tile * ROWS, ROWS)])
        if layout.factors == 2:
            return (bias,)
        return bias, vector(p.vectors["hidden_scale"].at[step, pl.ds(tile * ROWS, ROWS)])

    def store(tile: jax.Array, part: jax.Array, y: jax.Array, bias: jax.Array, *scale: jax.Array) -> None:
        del part
        y = activated(y + bias, layout.activation) * scale[0] if scale else y + bias
        place = tile // tiles, pl.ds(lax.rem(tile, tiles) * ROWS, ROWS)
        p.publish(y, "up", *place, mark=p.mark(token, step), layout=ROW)

    p.multiply("up", step, constants, prepare, p.take, store)


def leave_feedforward(program: Program, token: Token, step: Step) -> None:
    """Multiplies the hidden units by the output matrix of the feed-forward branch."""
    p = program

    def fill(offset: jax.Array, inputs: jax.Array) -> None:
        place = pl.ds(offset, inputs.shape[1])
        places = [("up", of, place) for of in range(p.layout.factors)]
        if p.layout.factors == 2:
            scale = p.vectors["hidden_scale"][step, place]
            gate, value = p.receive(*places, mark=p.mark(token, step))
            x = activated(gate, "silu") * value * scale
        else:
            (x,) = p.receive(*places, mark=p.mark(token, step))
        p.near["state"].at[pl.ds(0, inputs.shape[1])][...] = x
        p.take(0, inputs)

    _leave(p, "down", "2", token, step, fill)


def entering(program: Program, token: Token, step: Step) -> jax.Array:
    """Returns the state (D,) that enters a step: the token's embedding, or the one that left the step before."""
    p = program

    def embedded() -> jax.Array:
        return p.matrices["embedding"][token.word] + p.vectors["position"][token.position]

    with jax.named_scope("read"):
        return lax.cond(step == 0, embedded, lambda: moved(p, token, step - 1))


def moved(program: Program, token: Token, step: Step) -> jax.Array:
    """Returns the state (D,) after a step whose phases are done."""
    size = program.vectors["size"][step]
    state, *moves = program.receive(*_state(program, step, "out", "down"), mark=program.mark(token, step))
    return state + size * reduce(add, moves)


def _state(p: Program, step: Step, *names: str) -> list[tuple[Any, ...]]:
    """Returns where the state that entered a step is, and what the slices of these maps add to it."""
    turn = lax.rem(step, 2)
    return [("state", turn), *((name, turn, part) for name in names for part in range(p.layout.splits(name)))]


def _leave(p: Program, name: str, branch: str, token: Token, step: Step, fill: Fill) -> None:
    """Leaves what a branch adds, through its gate; the first slice of inputs adds the bias."""

    def constants(tile: jax.Array) -> tuple[jax.Array, ...]:
        place = pl.ds(tile * ROWS, ROWS)
        return tuple(vector(p.vectors[of].at[step, place]) for of in (f"gate{branch}", f"{name}_bias"))

    def store(tile: jax.Array, part: jax.Array, y: jax.Array, gate: jax.Array, bias: jax.Array) -> None:
        place = lax.rem(step, 2), part, pl.ds(tile * ROWS, ROWS)
        y = y * gate + bias * (part == 0).astype(jnp.float32)
        p.publish(y, name, *place, mark=p.mark(token, step), layout=ROW)

    p.multiply(name, step, constants, lambda: None, fill, store)


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
    enter(program, token, step)
    feed(program, token, step)


def _leave_both(program: Program, token: Token, step: Step) -> None:
    leave_attention(program, token, step)
    leave_feedforward(program, token, step)

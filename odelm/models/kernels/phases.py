"""The phases of a depth step, each of which reads what earlier ones published. A state goes in, the changes to it come
out.

With parallel branches there are three, since both branches read the same state: into both, attention, out of both.
Otherwise there are five. Where the batch has several rows, each row has a program that adds the changes to its state
and normalises it, in a phase before those that enter a branch: if all programs did so for all rows, they would spend
most of the time reading.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from odelm.models.kernels.activation import activated
from odelm.models.kernels.attend import attend
from odelm.models.kernels.layout import ROWS, Layout
from odelm.models.kernels.marked import strided
from odelm.models.kernels.multiply import Fill, Linear, multiply
from odelm.models.kernels.plain import vector
from odelm.models.kernels.program import Program
from odelm.models.kernels.rotation import of_positions, placed
from odelm.models.kernels.several import across, beside
from odelm.models.kernels.tokens import Newest

Step = jax.Array
"""int32 (), the number of an evaluation of a block."""
Phase = Callable[[Program, Any, Step], Any]


def phases_of(layout: Layout) -> dict[Phase, tuple[str, ...]]:
    """Returns the phases of a step, in order, and the maps of each, or "rows" for those with a program for a row."""
    rows: tuple[str, ...] = ("rows",)
    if layout.parallel:
        phases = {gather: rows, _enter_both: ("qkv", "up"), attend: (), _leave_both: ("out", "down")}
    else:
        phases = {gather: rows, enter: ("qkv",), attend: (), leave_attention: ("out",)}
        phases |= {gather_between: rows, feed: ("up",), leave_feedforward: ("down",)}
    return {phase: names for phase, names in phases.items() if layout.several or names != rows}


def gather(program: Program, token: Newest, step: Step) -> None:
    """Publishes the state of each row that enters a step, and what enters the branches that begin with it."""
    names = ("norm1", "norm2") if program.layout.parallel else ("norm1",)
    _gather(program, token, step, [program.affine_refs(name, step) for name in names])


def gather_last(program: Program, token: Newest) -> None:
    """Publishes what enters the readout for each row."""
    _gather(program, token, jnp.int32(program.layout.steps), [program.affine_refs("end")])


def _gather(p: Program, token: Newest, step: Step, norms: list[tuple[Any, Any]]) -> None:
    """Publishes the state of each row that enters a step, or leaves the last, as it is and by some norms, given
    references to their scales and shifts."""

    def work(number: Any, row: jax.Array) -> None:
        del number
        kept = dict(mark=p.mark(token, step), layout=strided(p.layout.width))
        state = entering(p, token, step, row)
        normed = p.normed(state)
        for place, (scale, shift) in enumerate(norms):
            p.publish(normed * scale[...] + shift[...], "normed", row, place, **kept)
        p.publish(state, "state", row, lax.rem(step, 2), **kept)

    p.share(p.layout.rows, work)


def gather_between(program: Program, token: Newest, step: Step) -> None:
    """Publishes what enters the feed-forward branch for each row, from the state after the attention branch."""
    p = program

    def work(number: Any, row: jax.Array) -> None:
        del number
        scale, shift = p.affine("norm2", step)
        x = p.normed(_after_attention(p, token, step, row)) * scale + shift
        p.publish(x, "normed", row, 1, mark=p.mark(token, step), layout=strided(p.layout.width))

    p.share(p.layout.rows, work)


def take_normed(program: Program, token: Newest, step: Step, place: int) -> None:
    """Writes the normalised states of several rows into the right side of a product."""
    mark = program.mark(token, step)
    program.take_received(lambda row: [("normed", row, place)], lambda x: x, program.layout.width, mark=mark)


def enter(program: Program, token: Newest, step: Step) -> None:
    """Computes queries, divided by the root of a head's size, keys and values from the state that enters a step, which
    is the token's embedding in the first. Publishes that state, where the batch has a single row."""
    p, layout = program, program.layout
    H, J = layout.heads, layout.kv_heads

    def prepare() -> None:
        if layout.several:
            take_normed(p, token, step, 0)
            return
        affine = p.affine("norm1", step)
        state = entering(p, token, step)
        kept = dict(mark=p.mark(token, step), layout=strided(p.layout.width))
        pl.when(p.me == 0)(lambda: p.publish(state, "state", 0, lax.rem(step, 2), **kept))
        p.take_normalised(state, affine)

    def constants(head: jax.Array) -> tuple[jax.Array, ...]:
        places = [p.vectors[f"qkv_{of}"].at[step, head] for of in ("bias", "scale")]
        if layout.qk_norm:
            places += [p.vectors[f"{name}_{of}"].at[step] for of in ("scale", "shift") for name in ("query", "key")]
        found = tuple(map(vector, places))
        return found + tuple(of_positions(p, of, token) for of in ("cos", "sin") if layout.rotary)

    def store(head: jax.Array, part: jax.Array, y: jax.Array, bias: jax.Array, scale: jax.Array, *others: Any) -> None:
        del part
        y = (y + across(bias, y)) * across(scale, y)
        x = lax.cond(head < H + J, lambda: placed(p, y, others, is_query=head < H), lambda: y)
        p.publish_all(x, "qkv", head, mark=p.mark(token, step))

    multiply(p, Linear("qkv", step, constants, prepare, _fill_of(p), store))


def _fill_of(p: Program) -> Fill:
    """Returns the function that writes the normalised state as a product's right side; it does nothing where `prepare`
    has written it."""
    return (lambda offset, size: None) if p.layout.several or p.layout.by_warps else p.take


def leave_attention(program: Program, token: Newest, step: Step) -> None:
    """Multiplies the averaged values of all heads by the output matrix of attention."""
    p, C = program, program.layout.chunk_splits

    def fill(offset: jax.Array, size: int) -> jax.Array | None:
        place = pl.ds(offset, size)

        def places(row: int) -> list[tuple[Any, ...]]:
            names = ("context", "weight") if C > 1 else ("context",)
            return [(name, row, c, place) for name in names for c in range(C)]

        return p.take_received(places, lambda *found: _averaged(found[:C], found[C:]), size, mark=p.mark(token, step))

    _leave(p, "out", "1", token, step, fill)


def _averaged(parts: Sequence[jax.Array], weights: Sequence[jax.Array]) -> jax.Array:
    """Returns the weighted average of averages, given the logarithms of their weights; of a single one, without."""
    if len(parts) == 1:
        return parts[0]
    top = reduce(jnp.maximum, weights)
    factors = [jnp.exp(one - top) for one in weights]
    averaged = reduce(add, [part * factor for part, factor in zip(parts, factors, strict=True)])
    return averaged / reduce(add, factors)


def feed(program: Program, token: Newest, step: Step) -> None:
    """Computes the hidden units, with their activation where each is made of one number."""
    p = program

    def prepare() -> None:
        if p.layout.several:
            take_normed(p, token, step, 1)
            return
        affine = p.affine("norm2", step)
        state = entering(p, token, step) if p.layout.parallel else _after_attention(p, token, step)
        p.take_normalised(state, affine)

    layout, tiles = p.layout, p.layout.hidden // ROWS

    def constants(tile: jax.Array) -> tuple[jax.Array, ...]:
        bias = vector(p.vectors["up_bias"].at[step, pl.ds(tile * ROWS, ROWS)])
        if layout.factors == 2:
            return (bias,)
        return bias, vector(p.vectors["hidden_scale"].at[step, pl.ds(tile * ROWS, ROWS)])

    def store(tile: jax.Array, part: jax.Array, y: jax.Array, bias: jax.Array, *scale: jax.Array) -> None:
        del part
        y = y + across(bias, y)
        if scale:
            y = activated(y, layout.activation) * across(scale[0], y)
        place = tile // tiles, pl.ds(lax.rem(tile, tiles) * ROWS, ROWS)
        p.publish_all(y, "up", *place, mark=p.mark(token, step))

    multiply(p, Linear("up", step, constants, prepare, _fill_of(p), store))


def leave_feedforward(program: Program, token: Newest, step: Step) -> None:
    """Multiplies the hidden units by the output matrix of the feed-forward branch."""
    p = program

    def fill(offset: jax.Array, size: int) -> jax.Array | None:
        place, several, factors = pl.ds(offset, size), p.layout.several, p.layout.factors
        scale = None
        if factors == 2:
            ref = p.vectors["hidden_scale"].at[step, place]
            scale = vector(ref, beside(size).reduce(0)) if several else ref[...]

        def units(x: jax.Array, *gated: jax.Array) -> jax.Array:
            return x if scale is None else activated(x, "silu") * gated[0] * scale

        return p.take_received(
            lambda row: [("up", row, of, place) for of in range(factors)], units, size, mark=p.mark(token, step)
        )

    _leave(p, "down", "2", token, step, fill)


def entering(program: Program, token: Newest, step: Step, row: Any = 0) -> jax.Array:
    """Returns the state (D,) that enters a step: the token's embedding, or the one that left the step before."""
    p = program

    def embedded() -> jax.Array:
        its = token.of(row)
        return p.matrices["embedding"][its.word] + p.vectors["position"][its.position]

    with jax.named_scope("read"):
        return lax.cond(step == 0, embedded, lambda: moved(p, token, step - 1, row))


def moved(program: Program, token: Newest, step: Step, row: Any = 0) -> jax.Array:
    """Returns the state (D,) after a step whose phases are done."""
    size = program.vectors["size"][step]
    state, *moves = program.receive(*_state(program, step, row, "out", "down"), mark=program.mark(token, step))
    return state + size * reduce(add, moves)


def _after_attention(p: Program, token: Newest, step: Step, row: Any = 0) -> jax.Array:
    """Returns the state (D,) in a step after the attention branch."""
    state, *moves = p.receive(*_state(p, step, row, "out"), mark=p.mark(token, step))
    return state + reduce(add, moves)


def _state(p: Program, step: Step, row: Any, *names: str) -> list[tuple[Any, ...]]:
    """Returns the places of the state of a row that entered a step, and of what the slices of these maps add to it."""
    turn = lax.rem(step, 2)
    moves = [(name, row, turn, part) for name in names for part in range(p.layout.splits(name))]
    return [("state", row, turn), *moves]


def _leave(p: Program, name: str, branch: str, token: Newest, step: Step, fill: Fill) -> None:
    """Publishes what a branch adds, times its gate; the first slice of inputs adds the bias."""

    def constants(tile: jax.Array) -> tuple[jax.Array, ...]:
        place = pl.ds(tile * ROWS, ROWS)
        return tuple(vector(p.vectors[of].at[step, place]) for of in (f"gate{branch}", f"{name}_bias"))

    def store(tile: jax.Array, part: jax.Array, y: jax.Array, gate: jax.Array, bias: jax.Array) -> None:
        place = lax.rem(step, 2), part, pl.ds(tile * ROWS, ROWS)
        y = y * across(gate, y) + across(bias * (part == 0).astype(jnp.float32), y)
        p.publish_all(y, name, *place, mark=p.mark(token, step))

    multiply(p, Linear(name, step, constants, lambda: None, fill, store))


def _enter_both(program: Program, token: Newest, step: Step) -> None:
    enter(program, token, step)
    feed(program, token, step)


def _leave_both(program: Program, token: Newest, step: Step) -> None:
    leave_attention(program, token, step)
    leave_feedforward(program, token, step)

"""Attention of one new token over a memory: each program averages the values of some positions of one head."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from odelm.models.kernels.attend_by_warps import ByWarps, Running
from odelm.models.kernels.chunks import PARTS, count_of, fetch, part_of, send
from odelm.models.kernels.layout import Layout
from odelm.models.kernels.marked import COLUMN, ROW
from odelm.models.kernels.plain import put, vector
from odelm.models.kernels.program import Program
from odelm.models.kernels.tokens import Token, Tokens

LEAST = -1e30
"""The score of a position that is not attended to."""


def attend(program: Program, token: Token | Tokens, step: jax.Array) -> None:
    """Averages values over the places up to the token's; publishes the averages, and the logarithms of their weights.

    The programs of a head take turns with chunks of places; the first program also has the new place, and the first of
    those that share a key and a value stores them in the memory. The first chunks must be on their way
    (`send_for_memory`).
    """
    layout, C = program.layout, program.layout.chunk_splits

    def work(number: Any, item: jax.Array) -> None:
        row, head, c = part_of(layout, item)
        place, sharing = token.of(row).place, layout.heads // layout.kv_heads
        group = head // sharing
        mark = program.mark(token, step)
        with jax.named_scope("receive"):
            query, *new = _received(program, row, head, mark)
            key, value = (x.astype(jnp.float32) for x in new)
        own, first = jnp.where(c == 0, jnp.sum(query * key), LEAST), (c == 0).astype(jnp.float32)
        count = count_of(layout, place, c)
        attends_by_warps = layout.attends_by_warps and program.shares_work
        way = ByWarps(program, query, LEAST) if attends_by_warps else _ByPlaces(layout, query)

        def fetch_chunk(i: Any, slot: Any, *names: str) -> None:
            pl.when(i < count)(lambda: fetch(program, step, row, (i * C + c) * layout.chunk, group, slot, *names))

        def chunk(i: jax.Array, running: Running) -> Running:
            part = (i * C + c) * layout.chunk, place
            if not layout.several:
                pl.when((i > 0) | (number > 0))(lambda: fetch(program, step, row, part[0], group))
                return _with_chunk(program, way, part, running)
            slot = lax.rem(i, layout.chunk_places)
            following = partial(fetch_chunk, i + layout.chunk_places, slot)
            return _with_chunk(program, way, part, running, slot, following)

        with jax.named_scope("chunks"):
            running = lax.fori_loop(0, count, chunk, way.nothing())
        if layout.several and layout.attended > layout.programs:  # on its way while this part is added up
            send(program, token, step, item + layout.programs)
        with jax.named_scope("add_up"):
            top, total, context = _with_own(way.added_up(running), own, first, value)
        _publish(program, (row, c, pl.ds(head * layout.head_size, layout.head_size)), (top, total, context), mark)

        @pl.when((c == 0) & (lax.rem(head, sharing) == 0))
        def keep_new() -> None:
            for x, memory in zip(new, (program.keys, program.values), strict=True):
                put(x, memory.at[step, row, place, pl.ds(group * layout.head_size, layout.head_size)])

    program.share(layout.attended, work)


def _publish(program: Program, place: tuple[Any, ...], found: Running, mark: jax.Array) -> None:
    """Publishes the average of a head's values over some places, and, where several programs share a head, the
    logarithm of its weight."""
    top, total, context = found
    some = jnp.where(total > 0, total, 1.0)
    program.publish(context / some, "context", *place, mark=mark, layout=COLUMN)
    if program.layout.chunk_splits > 1:
        weight = jnp.where(total > 0, top + jnp.log(some), LEAST)
        program.publish(weight + 0.0 * context, "weight", *place, mark=mark, layout=COLUMN)


def _received(program: Program, row: Any, head: jax.Array, mark: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a head's query (K,), and the new key and value that it attends to, in the dtype of the memory."""
    layout = program.layout
    group = head // (layout.heads // layout.kv_heads)
    places = [("qkv", row, of) for of in (head, layout.heads + group, layout.heads + layout.kv_heads + group)]
    query, key, value = program.receive(*places, mark=mark, layout=COLUMN, together=layout.several)
    return query, key.astype(layout.dtype), value.astype(layout.dtype)


def _with_own(found: Running, own: jax.Array, first: jax.Array, value: jax.Array) -> Running:
    """Returns what the places have together (`added_up`), with the new place, whose score is `own`; `first` is 1 in the
    program that has it, else 0."""
    top, total, context = found
    largest = jnp.maximum(top, own)
    share, mine = jnp.exp(top - largest), first * jnp.exp(own - largest)
    return largest, total * share + mine, context * share + value * mine


class _ByPlaces:
    """Of each place within a chunk, over the chunks so far: the largest score (chunk,), the sum of exp(score - largest)
    (chunk,), and the values (chunk, K) weighted by the same. What the places have is added up once, after the last
    chunk: threads wait for each other to do it, which took longer than all else of a chunk."""

    def __init__(self, layout: Layout, query: jax.Array):
        self.layout = layout
        self.queries = lax.broadcast_in_dim(query, (layout.chunk, layout.head_size), (1,))

    def nothing(self) -> Running:
        """Returns the running average before the first chunk."""
        empty = plgpu.layout_cast(jnp.zeros(self.queries.shape, jnp.float32), plgpu.Layout.WGMMA)
        numbers = plgpu.layout_cast(jnp.zeros((self.layout.chunk,), jnp.float32), ROW)
        return numbers + LEAST, numbers, empty

    def scores(self, near: dict[str, Any], start: jax.Array, end: jax.Array) -> jax.Array:
        """Returns the scores of a chunk that is in shared memory, from the place `start` on; `LEAST` from `end` on."""
        found = jnp.sum(near["keys"][...].astype(jnp.float32) * self.queries, axis=1) + vector(near["hidden"])
        places = start + plgpu.broadcasted_iota(jnp.int32, (self.layout.chunk,), 0, layout=ROW)
        return jnp.where(places < end, found, LEAST)

    def with_values(self, near: dict[str, Any], scores: jax.Array, running: Running) -> Running:
        """Returns the running average after adding a chunk, whose values are in shared memory."""
        top, total, context = running
        new, shape = jnp.maximum(top, scores), self.queries.shape
        weights, kept = jnp.exp(scores - new), jnp.exp(top - new)
        weighted = near["values"][...].astype(jnp.float32) * lax.broadcast_in_dim(weights, shape, (0,))
        return new, total * kept + weights, context * lax.broadcast_in_dim(kept, shape, (0,)) + weighted

    def added_up(self, running: Running) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the largest score, the sum of exp(score - largest), and the values (K,) weighted by the same, over
        all places."""
        top, total, context = running
        largest = jnp.max(top)
        share = jnp.exp(top - largest)
        context = jnp.sum(context * lax.broadcast_in_dim(share, context.shape, (0,)), axis=0)
        return largest, jnp.sum(total * share), context


def _with_chunk(
    program: Program,
    way: _ByPlaces | ByWarps,
    part: tuple[jax.Array, jax.Array],
    running: Running,
    slot: Any = 0,
    following: Callable[..., None] = lambda *names: None,
) -> Running:
    """Returns the running average after adding a chunk that is being copied: of its places, from the first number of
    `part` on, those before the second. Calls `following` with names of `PARTS` as soon as these have been read."""
    near = {name: program.near[name].at[slot] for name in PARTS}
    arrival = {name: program.near["memory_arrival"].at[slot * len(PARTS) + i] for i, name in enumerate(PARTS)}
    plgpu.barrier_wait(arrival["keys"])
    plgpu.barrier_wait(arrival["hidden"])
    scores = way.scores(near, *part)
    following("keys", "hidden")
    plgpu.barrier_wait(arrival["values"])
    running = way.with_values(near, scores, running)
    following("values")
    return running

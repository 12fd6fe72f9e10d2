"""Attention of one new token over a memory: each program averages the values of some positions of one head."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from odelm.models.kernels.marked import COLUMN, ROW
from odelm.models.kernels.program import Program, Token, vector

LEAST = -1e30
"""In place of the score of a position that is not seen."""
Running = tuple[jax.Array, jax.Array, jax.Array]
"""The largest score so far, the sum of exp(score - largest), and the values (K,) weighted by the same."""


def send_for_memory(program: Program, token: Token, step: jax.Array) -> None:
    """Starts to copy the first chunk of keys and values that this program will read in `attend`."""
    layout, C = program.layout, program.layout.chunk_splits
    head, c = program.me // C, lax.rem(program.me, C)
    start = c * layout.chunk
    program.see_stores()

    @pl.when((program.me < layout.heads * C) & (start < token.place))
    def send() -> None:
        _fetch(program, step, start, head // (layout.heads // layout.kv_heads))


def attend(program: Program, token: Token, step: jax.Array) -> None:
    """Averages values over the places up to the token's; leaves the averages, and the logarithms of their weights.

    The programs of a head take turns with chunks of places; the first of them has the new one too. The first chunk must
    be on its way (`send_for_memory`).
    """
    layout, C, place = program.layout, program.layout.chunk_splits, token.place

    def work(number: Any, item: jax.Array) -> None:
        head, c = item // C, lax.rem(item, C)
        group = head // (layout.heads // layout.kv_heads)
        mark = program.mark(token, step)
        places = [("qkv", of) for of in (head, layout.heads + group, layout.heads + layout.kv_heads + group)]
        query, key, value = program.receive(*places, mark=mark, layout=COLUMN)
        key, value = (x.astype(layout.dtype).astype(jnp.float32) for x in (key, value))
        own, first = jnp.sum(query * key), (c == 0).astype(jnp.float32)
        start = jnp.where(c == 0, own, LEAST), first, value * first
        count = jnp.maximum(pl.cdiv(pl.cdiv(place, layout.chunk) - c, C), 0)
        queries = lax.broadcast_in_dim(query, (layout.chunk, layout.head_size), (1,))

        def chunk(i: jax.Array, running: Running) -> Running:
            pl.when((i > 0) | (number > 0))(lambda: _fetch(program, step, (i * C + c) * layout.chunk, group))
            return _with_chunk(program, (i * C + c) * layout.chunk, queries, place, running)

        with jax.named_scope("chunks"):
            top, total, context = lax.fori_loop(0, count, chunk, start)
        here = (c, pl.ds(head * layout.head_size, layout.head_size))
        some = jnp.where(total > 0, total, 1.0)
        weight = jnp.where(total > 0, top + jnp.log(some), LEAST)
        program.publish(context / some, "context", *here, mark=mark, layout=COLUMN)
        program.publish(weight + 0.0 * context, "weight", *here, mark=mark, layout=COLUMN)

    program.share(layout.heads * C, work)


def _fetch(program: Program, step: jax.Array, start: jax.Array, group: jax.Array) -> None:
    """Starts to copy the keys and values of a chunk of places from `start` on."""
    layout, near, arrival = program.layout, program.near, program.near["memory_arrival"]
    here = (step, pl.ds(start, layout.chunk), pl.ds(group * layout.head_size, layout.head_size))
    plgpu.copy_gmem_to_smem(program.keys.at[here], near["keys"], arrival.at[0])
    plgpu.copy_gmem_to_smem(program.values.at[here], near["values"], arrival.at[1])
    plgpu.copy_gmem_to_smem(program.vectors["hidden"].at[pl.ds(start, layout.chunk)], near["hidden"], arrival.at[2])


def _with_chunk(program: Program, start: jax.Array, queries: jax.Array, end: jax.Array, running: Running) -> Running:
    """Returns the average with a chunk that is on its way, the places from `start` on that are before `end`; `queries`
    is the query, once for each of them."""
    layout, near, arrival = program.layout, program.near, program.near["memory_arrival"]
    top, total, context = running
    plgpu.barrier_wait(arrival.at[0])
    scores = jnp.sum(near["keys"][...].astype(jnp.float32) * queries, axis=1)
    plgpu.barrier_wait(arrival.at[2])
    scores = scores + vector(near["hidden"])
    seen = start + plgpu.broadcasted_iota(jnp.int32, (layout.chunk,), 0, layout=ROW) < end
    scores = jnp.where(seen, scores, LEAST)
    new = jnp.maximum(top, jnp.max(scores))
    weights, kept = jnp.exp(scores - new), jnp.exp(top - new)
    plgpu.barrier_wait(arrival.at[1])
    weighted = near["values"][...].astype(jnp.float32) * lax.broadcast_in_dim(weights, queries.shape, (0,))
    return new, total * kept + jnp.sum(weights), context * kept + jnp.sum(weighted, axis=0)

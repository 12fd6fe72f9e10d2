"""Attention of one new token over a memory: each program averages the values of some positions of one head."""

from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from odelm.models.kernels.program import COLUMN, ROW, Program, Token, put, vector

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
    """Averages values over the places up to the token's, and keeps its key and value in the memory.

    The programs of a head take turns with chunks of places; the first of them has the new one too. The first chunk must
    be on its way (`send_for_memory`).
    """
    layout, C, place = program.layout, program.layout.chunk_splits, token.place

    def work(number: Any, item: jax.Array) -> None:
        head, c = item // C, lax.rem(item, C)
        group = head // (layout.heads // layout.kv_heads)
        query, key, value = projected(program, head, group, token.position, step)

        @pl.when((c == 0) & (lax.rem(head, layout.heads // layout.kv_heads) == 0))
        def keep_new() -> None:
            here = (step, place, pl.ds(group * layout.head_size, layout.head_size))
            put(key, program.keys.at[here])
            put(value, program.values.at[here])

        own, first = jnp.sum(query * key.astype(jnp.float32)), (c == 0).astype(jnp.float32)
        start = jnp.where(c == 0, own, LEAST), first, value.astype(jnp.float32) * first
        count = jnp.maximum(pl.cdiv(pl.cdiv(place, layout.chunk) - c, C), 0)
        queries = lax.broadcast_in_dim(query, (layout.chunk, layout.head_size), (1,))

        def chunk(i: jax.Array, running: Running) -> Running:
            pl.when((i > 0) | (number > 0))(lambda: _fetch(program, step, (i * C + c) * layout.chunk, group))
            return _with_chunk(program, (i * C + c) * layout.chunk, queries, place, running)

        top, total, context = lax.fori_loop(0, count, chunk, start)
        put(context, program.between["context"].at[c, head])
        program.between["top"][head, c], program.between["total"][head, c] = top, total

    program.share(layout.heads * C, work)


def projected(
    program: Program, head: jax.Array, group: jax.Array, position: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the query of a head, divided by the root of its size, float32 (K,), and the key and the value of its
    group in the dtype of the memory."""
    layout, K = program.layout, program.layout.head_size
    H, J = layout.heads, layout.kv_heads

    def read(number: jax.Array, offset: int) -> jax.Array:
        """Returns what the input map gives for a head, from an offset on, and from its beginning after its end."""
        place = pl.ds(offset, K)
        slices = range(program.between["qkv"].shape[0])
        total = reduce(add, [vector(program.between["qkv"].at[i, number, place], COLUMN) for i in slices])
        bias, scale = (vector(program.vectors[f"qkv_{name}"].at[step, number, place], COLUMN) for name in _MAP)
        return (total + bias) * scale

    def turned(number: jax.Array, name: str) -> jax.Array:
        """Returns a query or key, normalised and turned by its position."""
        halves = {offset: read(number, offset) for offset in (0, K // 2)}
        if layout.qk_norm:
            x = halves[0]
            mean = jnp.sum(x) / K if layout.norm == "layernorm" else 0.0
            root = lax.rsqrt(jnp.sum((x - mean) * (x - mean)) / K + layout.eps)
            for offset in halves:
                place = (step, pl.ds(offset, K))
                scale, shift = (vector(program.vectors[f"{name}_{of}"].at[place], COLUMN) for of in ("scale", "shift"))
                halves[offset] = (halves[offset] - mean) * root * scale + shift
        if not layout.rotary:
            return halves[0]
        cos, sin = (vector(program.vectors[of].at[position], COLUMN) for of in ("cos", "sin"))
        return halves[0] * cos + halves[K // 2] * sin

    key, value = turned(H + group, "key"), read(H + J + group, 0)
    return turned(head, "query") * K**-0.5, key.astype(layout.dtype), value.astype(layout.dtype)


_MAP = ("bias", "scale")


def _fetch(program: Program, step: jax.Array, start: jax.Array, group: jax.Array) -> None:
    """Starts to copy the keys and values of a chunk of places from `start` on."""
    layout, near, arrival = program.layout, program.near, program.near["memory_arrival"]
    here = (step, pl.ds(start, layout.chunk), pl.ds(group * layout.head_size, layout.head_size))
    plgpu.copy_gmem_to_smem(program.keys.at[here], near["keys"], arrival.at[0])
    plgpu.copy_gmem_to_smem(program.values.at[here], near["values"], arrival.at[1])


def _with_chunk(program: Program, start: jax.Array, queries: jax.Array, end: jax.Array, running: Running) -> Running:
    """Returns the average with a chunk that is on its way, the places from `start` on that are before `end`; `queries`
    is the query, once for each of them."""
    layout, near, arrival = program.layout, program.near, program.near["memory_arrival"]
    top, total, context = running
    plgpu.barrier_wait(arrival.at[0])
    scores = jnp.sum(near["keys"][...].astype(jnp.float32) * queries, axis=1)
    scores = scores + vector(program.vectors["hidden"].at[pl.ds(start, layout.chunk)])
    seen = start + plgpu.broadcasted_iota(jnp.int32, (layout.chunk,), 0, layout=ROW) < end
    scores = jnp.where(seen, scores, LEAST)
    new = jnp.maximum(top, jnp.max(scores))
    weights, kept = jnp.exp(scores - new), jnp.exp(top - new)
    plgpu.barrier_wait(arrival.at[1])
    weighted = near["values"][...].astype(jnp.float32) * lax.broadcast_in_dim(weights, queries.shape, (0,))
    return new, total * kept + jnp.sum(weights), context * kept + jnp.sum(weighted, axis=0)

"""Attention of one new token over a memory: each program averages the values of some positions of one head."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from odelm.models.kernels.layout import Layout
from odelm.models.kernels.marked import COLUMN, ROW
from odelm.models.kernels.plain import put, vector
from odelm.models.kernels.program import Program
from odelm.models.kernels.tokens import Token, Tokens

LEAST = -1e30
"""The score of a position that is not attended to."""
PARTS = ("keys", "values", "hidden")
"""The parts of a chunk of places that are copied, each with a barrier of its own."""
Running = tuple[jax.Array, jax.Array, jax.Array]
"""Of each place within a chunk, over the chunks so far: the largest score (chunk,), the sum of exp(score - largest)
(chunk,), and the values (chunk, K) weighted by the same. What the places have is added up once, after the last chunk:
threads wait for each other to do it, which took longer than all else of a chunk."""


def send_for_memory(program: Program, token: Token | Tokens, step: jax.Array) -> None:
    """Starts to copy the first chunks of keys and values that this program will read in `attend`."""
    program.see_stores()
    _send(program, token, step, program.me)


def _send(program: Program, token: Token | Tokens, step: jax.Array, item: jax.Array) -> None:
    """Starts to copy the first chunks of a part of attention, if there is such a part."""
    layout = program.layout
    row, head, c = _part(layout, item)
    for slot in range(layout.chunk_places):
        start = (slot * layout.chunk_splits + c) * layout.chunk

        @pl.when((item < layout.attended) & (start < token.of(row).place))
        def send(slot: int = slot, start: jax.Array = start) -> None:
            _fetch(program, step, row, start, head // (layout.heads // layout.kv_heads), slot)


def attend(program: Program, token: Token | Tokens, step: jax.Array) -> None:
    """Averages values over the places up to the token's; publishes the averages, and the logarithms of their weights.

    The programs of a head take turns with chunks of places; the first program also has the new place, and the first of
    those that share a key and a value stores them in the memory. The first chunks must be on their way
    (`send_for_memory`).
    """
    layout, C = program.layout, program.layout.chunk_splits

    def work(number: Any, item: jax.Array) -> None:
        row, head, c = _part(layout, item)
        place, sharing = token.of(row).place, layout.heads // layout.kv_heads
        group = head // sharing
        mark = program.mark(token, step)
        places = [("qkv", row, of) for of in (head, layout.heads + group, layout.heads + layout.kv_heads + group)]
        query, key, value = program.receive(*places, mark=mark, layout=COLUMN)
        new = key.astype(layout.dtype), value.astype(layout.dtype)
        key, value = (x.astype(jnp.float32) for x in new)
        own, first = jnp.where(c == 0, jnp.sum(query * key), LEAST), (c == 0).astype(jnp.float32)
        count = jnp.maximum(pl.cdiv(pl.cdiv(place, layout.chunk) - c, C), 0)
        queries = lax.broadcast_in_dim(query, (layout.chunk, layout.head_size), (1,))

        def fetch(i: Any, slot: Any, *names: str) -> None:
            pl.when(i < count)(lambda: _fetch(program, step, row, (i * C + c) * layout.chunk, group, slot, *names))

        def chunk(i: jax.Array, running: Running) -> Running:
            part = (i * C + c) * layout.chunk, place
            if not layout.several:
                pl.when((i > 0) | (number > 0))(lambda: _fetch(program, step, row, part[0], group))
                return _with_chunk(program, part, queries, running)
            slot = lax.rem(i, layout.chunk_places)
            following = partial(fetch, i + layout.chunk_places, slot)
            return _with_chunk(program, part, queries, running, slot, following)

        with jax.named_scope("chunks"):
            running = lax.fori_loop(0, count, chunk, _nothing(layout))
        if layout.several and layout.attended > layout.programs:  # on its way while this part is added up
            _send(program, token, step, item + layout.programs)
        top, total, context = _added_up(running, own, first, value)
        here = (row, c, pl.ds(head * layout.head_size, layout.head_size))
        some = jnp.where(total > 0, total, 1.0)
        weight = jnp.where(total > 0, top + jnp.log(some), LEAST)
        program.publish(context / some, "context", *here, mark=mark, layout=COLUMN)
        if C > 1:
            program.publish(weight + 0.0 * context, "weight", *here, mark=mark, layout=COLUMN)

        @pl.when((c == 0) & (lax.rem(head, sharing) == 0))
        def keep_new() -> None:
            for x, memory in zip(new, (program.keys, program.values), strict=True):
                put(x, memory.at[step, row, place, pl.ds(group * layout.head_size, layout.head_size)])

    program.share(layout.attended, work)


def _part(layout: Layout, item: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    """Returns, for a part of attention, its row, its head, and its number among the head's programs."""
    C, H = layout.chunk_splits, layout.heads
    if not layout.several:
        return 0, item // C, lax.rem(item, C)
    return jnp.minimum(item // (H * C), layout.rows - 1), lax.rem(item // C, H), lax.rem(item, C)


def _fetch(
    program: Program, step: jax.Array, row: Any, start: jax.Array, group: jax.Array, slot: Any = 0, *names: str
) -> None:
    """Starts to copy the parts in `names`, or all `PARTS`, of the chunk of a row's places from `start` on."""
    layout, near, arrival = program.layout, program.near, program.near["memory_arrival"]
    here = (step, row, pl.ds(start, layout.chunk), pl.ds(group * layout.head_size, layout.head_size))
    hidden = program.vectors["hidden"].at[row, pl.ds(start, layout.chunk)]
    of = {"keys": program.keys.at[here], "values": program.values.at[here], "hidden": hidden}
    for name in names or PARTS:
        plgpu.copy_gmem_to_smem(of[name], near[name].at[slot], arrival.at[slot * len(PARTS) + PARTS.index(name)])


def _nothing(layout: Layout) -> Running:
    """Returns the running average before the first chunk."""
    empty = plgpu.layout_cast(jnp.zeros((layout.chunk, layout.head_size), jnp.float32), plgpu.Layout.WGMMA)
    numbers = plgpu.layout_cast(jnp.zeros((layout.chunk,), jnp.float32), ROW)
    return numbers + LEAST, numbers, empty


def _added_up(
    running: Running, own: jax.Array, first: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the largest score, the sum of exp(score - largest), and the values (K,) weighted by the same, over all
    places and the new one, whose score is `own`; `first` is 1 in the program that has it, else 0."""
    top, total, context = running
    largest = jnp.maximum(jnp.max(top), own)
    share, mine = jnp.exp(top - largest), first * jnp.exp(own - largest)
    context = jnp.sum(context * lax.broadcast_in_dim(share, context.shape, (0,)), axis=0)
    return largest, jnp.sum(total * share) + mine, context + value * mine


def _with_chunk(
    program: Program,
    part: tuple[jax.Array, jax.Array],
    queries: jax.Array,
    running: Running,
    slot: Any = 0,
    following: Callable[..., None] = lambda *names: None,
) -> Running:
    """Returns the running average after adding a chunk that is being copied: of its places, from the first number of
    `part` on, those before the second; `queries` is the query, once for each place. Calls `following` with names of
    `PARTS` as soon as these have been read."""
    layout, near = program.layout, {name: program.near[name].at[slot] for name in PARTS}
    arrival = {name: program.near["memory_arrival"].at[slot * len(PARTS) + i] for i, name in enumerate(PARTS)}
    top, total, context = running
    plgpu.barrier_wait(arrival["keys"])
    scores = jnp.sum(near["keys"][...].astype(jnp.float32) * queries, axis=1)
    plgpu.barrier_wait(arrival["hidden"])
    scores = scores + vector(near["hidden"])
    following("keys", "hidden")
    seen = part[0] + plgpu.broadcasted_iota(jnp.int32, (layout.chunk,), 0, layout=ROW) < part[1]
    scores = jnp.where(seen, scores, LEAST)
    new = jnp.maximum(top, scores)
    weights, kept = jnp.exp(scores - new), jnp.exp(top - new)
    plgpu.barrier_wait(arrival["values"])
    weighted = near["values"][...].astype(jnp.float32) * lax.broadcast_in_dim(weights, queries.shape, (0,))
    following("values")
    return new, total * kept + weights, context * lax.broadcast_in_dim(kept, queries.shape, (0,)) + weighted

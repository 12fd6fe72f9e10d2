"""The chunks of keys and values that a program reads of the memory, and when they are copied into its shared memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from odelm.models.kernels.layout import Layout
from odelm.models.kernels.program import Program
from odelm.models.kernels.tokens import Newest

PARTS = ("keys", "values", "hidden")
"""The parts of a chunk of places that are copied, each with a barrier of its own."""
AHEAD_BYTES = 24_000_000
"""How much all programs together may load ahead: about half of the L2 cache of an H100 or H200."""


def part_of(layout: Layout, item: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    """Returns, for a part of attention, its row, its head, and its number among the head's programs."""
    C, H = layout.chunk_splits, layout.heads
    if not layout.several:
        return 0, item // C, lax.rem(item, C)
    return jnp.minimum(item // (H * C), layout.rows - 1), lax.rem(item // C, H), lax.rem(item, C)


def count_of(layout: Layout, place: jax.Array, c: jax.Array) -> jax.Array:
    """Returns how many chunks of the places before `place` the `c`-th program of a head reads."""
    return jnp.maximum(pl.cdiv(pl.cdiv(place, layout.chunk) - c, layout.chunk_splits), 0)


def send_for_memory(program: Program, token: Newest, step: jax.Array) -> None:
    """Starts to copy the first chunks that this program will read in `attend`."""
    program.see_stores()
    send(program, token, step, program.me)


def load_memory_ahead(program: Program, token: Newest, step: jax.Array) -> None:
    """Starts to load the chunks of this program's first part of attention into the L2 cache, except the first chunk,
    which is copied at once, and up to `AHEAD_BYTES` for all programs. Does nothing with several rows, where it took
    longer."""
    layout, C = program.layout, program.layout.chunk_splits
    if not program.shares_work or layout.several or layout.room <= C * layout.chunk:
        return
    row, head, c = part_of(layout, program.me)
    size = 2 * layout.chunk * layout.head_size * jnp.dtype(layout.dtype).itemsize
    most = AHEAD_BYTES // (size * min(layout.attended, layout.programs))

    @pl.when(program.me < layout.attended)
    def load() -> None:
        @pl.loop(1, jnp.minimum(count_of(layout, token.of(row).place, c), most))
        def load_chunk(i: jax.Array) -> None:
            start = (i * C + c) * layout.chunk
            load_ahead(*_places(program, step, row, start, head // (layout.heads // layout.kv_heads)))


def send(program: Program, token: Newest, step: jax.Array, item: jax.Array) -> None:
    """Starts to copy the first chunks of a part of attention, if there is such a part."""
    layout = program.layout
    row, head, c = part_of(layout, item)
    for slot in range(layout.chunk_places):
        start = (slot * layout.chunk_splits + c) * layout.chunk

        @pl.when((item < layout.attended) & (start < token.of(row).place))
        def send_one(slot: int = slot, start: jax.Array = start) -> None:
            fetch(program, step, row, start, head // (layout.heads // layout.kv_heads), slot)


def fetch(
    program: Program, step: jax.Array, row: Any, start: jax.Array, group: jax.Array, slot: Any = 0, *names: str
) -> None:
    """Starts to copy the parts in `names`, or all `PARTS`, of the chunk of a row's places from `start` on."""
    near, arrival = program.near, program.near["memory_arrival"]
    keys, values = _places(program, step, row, start, group)
    of = {"keys": keys, "values": values, "hidden": program.vectors["hidden"].at[row, pl.ds(start, keys.shape[0])]}
    for name in names or PARTS:
        plgpu.copy_gmem_to_smem(of[name], near[name].at[slot], arrival.at[slot * len(PARTS) + PARTS.index(name)])


def load_ahead(*refs: Any) -> None:
    """Starts to load some numbers of each of several neighbouring places, (places, numbers), into the L2 cache."""
    for ref in refs:
        plgpu.async_prefetch(ref)


def _places(program: Program, step: jax.Array, row: Any, start: jax.Array, group: jax.Array) -> tuple[Any, Any]:
    """Returns where the keys and values of the chunk of a row's places from `start` on are in global memory."""
    layout = program.layout
    here = (step, row, pl.ds(start, layout.chunk), pl.ds(group * layout.head_size, layout.head_size))
    return program.keys.at[here], program.values.at[here]

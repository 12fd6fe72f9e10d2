"""The arrays of a kernel: those through which programs exchange results, and those of each in shared memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.layout import COLUMNS, ROWS, Layout

plgpu: Any = mosaic_gpu


def exchanged(layout: Layout, *, marked: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays in global memory through which programs exchange results; they begin as zeros.

    The batch axis is the first, but for best tokens the last. Results of the step before that a step reads, and best
    tokens, alternate between two places: a program may read one while the next is written. `normed` has one place for
    what enters the first branch and one for the second: the program that writes a place again depends on all that read
    it.
    """
    s, D, attended = layout, layout.width, (layout.chunk_splits, layout.heads * layout.head_size)
    steps = {
        "state": (2, D),
        "qkv": (s.mapped_heads, s.head_size),
        "context": attended,
        "weight": attended,
        "out": (2, s.splits("out"), D),
        "up": (s.factors, s.filled_hidden),
        "down": (2, s.splits("down"), D),
    }
    shape = jax.ShapeDtypeStruct
    if s.several:
        steps["normed"] = (2, D)
    steps = {name: (s.rows, *of) for name, of in steps.items()}
    found = {name: shape(of, jnp.float32) for name, of in steps.items()}
    if marked:
        halves = {name: 2 if name in s.paired else 1 for name in steps}
        found = {name: shape((*of[:-1], of[-1] // halves[name], 2), jnp.int32) for name, of in steps.items()}
    best = (2, s.slots, s.columns) if s.several else (2, s.slots)
    found |= {name: shape(best, jnp.float32) for name in ("best", "best_logit", "top_logit", "sum")}
    found["likelier"] = shape((s.slots,), jnp.float32)
    if s.rounded:
        found |= {"best_rounded": shape(best, jnp.float32), "bound": shape((1, 2), jnp.int32)}
    return found | {"best_word": shape(best, jnp.int32), "arrived": shape((1,), jnp.int32)}


def scratch(layout: Layout) -> dict[str, Any]:
    """Returns the arrays and barriers of a program in shared memory."""
    s, dtype = layout, layout.dtype
    kept = {name: plgpu.SMEM((s.tiles, ROWS), jnp.float32) for name in ("logits", "scores")} if s.filtered else {}
    if s.rounded:
        kept = {name: plgpu.SMEM((s.kept_words,), jnp.float32) for name in s.rounded_names}
        kept |= {} if s.in_bytes else {"rounded_inputs": plgpu.SMEM((COLUMNS, s.width), jnp.int8)}
        kept |= {"out": plgpu.SMEM((1, ROWS, s.out_slice), s.block_dtype)}
    if s.several:
        kept |= {"turned": plgpu.SMEM((2 * ROWS, COLUMNS), jnp.float32)}
    else:
        kept |= {"state": plgpu.SMEM((s.longest,), jnp.float32), "turned": plgpu.SMEM((2 * ROWS,), jnp.float32)}
    if s.by_warps:
        kept |= {"pairs": plgpu.SMEM((s.longest // 2,), jnp.int32)}
    else:
        kept |= {"inputs": plgpu.SMEM((1, s.columns, s.longest), s.block_dtype)}
    return kept | {
        "matrix": plgpu.SMEM((1, ROWS, s.width), s.block_dtype),
        "arrivals": plgpu.Barrier(num_barriers=1 + s.out_places),
        "keys": plgpu.SMEM((s.chunk_places, s.chunk, s.head_size), dtype),
        "values": plgpu.SMEM((s.chunk_places, s.chunk, s.head_size), dtype),
        "hidden": plgpu.SMEM((s.chunk_places, s.chunk), jnp.float32),
        "memory_arrival": plgpu.Barrier(num_barriers=3 * s.chunk_places),
        "readout": plgpu.SMEM((s.ring, ROWS, s.ring_slice), jnp.int8 if s.rounded else dtype),
        "readout_arrival": plgpu.Barrier(num_barriers=s.ring),
    }

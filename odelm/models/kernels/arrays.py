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
    if s.several:
        kept |= {"turned": plgpu.SMEM((2 * ROWS, COLUMNS), jnp.float32)}
    else:
        kept |= {"state": plgpu.SMEM((s.longest,), jnp.float32), "turned": plgpu.SMEM((2 * ROWS,), jnp.float32)}
    if s.by_warps:
        kept |= {"pairs": plgpu.SMEM((s.longest // 2,), jnp.int32)}
    else:
        kept |= {"inputs": plgpu.SMEM((1, s.columns, s.longest), s.block_dtype)}
    return kept | {
        "matrix": plgpu.SMEM((s.matrix_places, ROWS, s.width // s.matrix_places), s.block_dtype),
        "arrivals": plgpu.Barrier(num_barriers=s.matrix_places + s.out_parts),
        "values": plgpu.SMEM((s.chunk_places, s.chunk, s.head_size), dtype),
        "hidden": plgpu.SMEM((s.chunk_places, s.chunk), jnp.float32),
        "memory_arrival": plgpu.Barrier(num_barriers=3 * s.chunk_places),
        "readout_arrival": plgpu.Barrier(num_barriers=s.ring),
        **_in_turns(s),
    }


def _in_turns(s: Layout) -> dict[str, Any]:
    """Returns the arrays of `scratch` that share their memory where the readout is rounded: what is used until the
    readout, and what is used in it."""
    keys = plgpu.SMEM((s.chunk_places, s.chunk, s.head_size), s.dtype)
    readout = plgpu.SMEM((s.ring, ROWS, s.ring_slice), jnp.int8 if s.rounded else s.dtype)
    if not s.rounded:
        return {"keys": keys, "readout": readout}
    found = {"out, readout": plgpu.RefUnion(plgpu.SMEM((1, ROWS, s.out_slice), s.block_dtype), readout)}
    if s.in_bytes:
        return found | {"keys": keys}
    return found | {"keys, rounded_inputs": plgpu.RefUnion(keys, plgpu.SMEM((COLUMNS, s.width), jnp.int8))}


def by_name(near: dict[str, Any]) -> dict[str, Any]:
    """Returns references to what `scratch` describes by the name of each, also of those that share their memory."""
    found = {}
    for names, ref in near.items():
        found |= dict(zip(names.split(", "), ref, strict=True)) if ", " in names else {names: ref}
    return found

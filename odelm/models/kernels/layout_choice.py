"""The layout that suits a model: how a kernel divides it among its programs."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp

from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.models.kernels.layout import (
    CHUNK,
    COLUMNS,
    GATHERED,
    PAIRED_ROWS,
    PROGRAMS,
    RING_SLICES,
    RINGS,
    ROWS,
    THREADS,
    Layout,
)
from odelm.models.kernels.portions import can_be_halved, kept
from odelm.models.kernels.sharing import splits
from odelm.models.transformer import DepthPlan


def layout_of(config: ModelConfig, plan: DepthPlan, room: int, **options: Any) -> Layout:
    """Returns the layout of a model that `unsupported` accepts; the memory has at least `room` places.

    The readout gets the shared memory that is left. `options` set fields of the layout, which are then not chosen.
    Readout rows have 8 bits by default, and 16 where tokens are filtered, there are several rows, or there is no room
    for both. `by_warps`, `short_sums` for one row and from `PAIRED_ROWS` on, and `attends_by_warps` for one row are on
    by default where they are supported, but the latter two not with `block_bits=8`: these cases were run on a GPU. The
    layout is `halved` for one row where pieces would take turns otherwise. Raises InputError for `block_bits=8` with
    several rows, filtered tokens or a readout of 16 bits, and for `halved` where that is not supported.
    """
    told = options.pop("halved", None)
    chunk, D, F = options.get("chunk", CHUNK), config.width, config.feedforward_size
    rows, in_bytes = options.get("rows", 1), options.get("block_bits") == 8
    parts = config.heads, rows, options.get("programs", PROGRAMS), -(-room // chunk)
    chosen: dict[str, Any] = dict(out_slice=_slice(config.heads * config.head_size), chunk_splits=splits(*parts))
    chosen["marks"] = F % D == 0  # units that fill up the last slice are written by nobody
    chosen |= dict(readout_bits=8, by_warps=True, pairs=rows >= PAIRED_ROWS)
    short = (rows == 1 or rows >= PAIRED_ROWS) and not in_bytes
    chosen |= dict(short_sums=short, attends_by_warps=rows == 1 and not in_bytes)
    layout = Layout(
        width=D, heads=config.heads, kv_heads=config.key_value_heads, head_size=config.head_size, hidden=F,
        vocabulary=-(-config.vocab_size // ROWS) * ROWS, words=config.vocab_size, room=-(-room // chunk) * chunk,
        steps=sum(part.times.shape[0] for part in plan), norm=config.norm, eps=config.norm_eps,
        activation=config.activation, parallel=config.parallel_branches, rotary=config.positions == "rotary",
        qk_norm=config.qk_norm, **chosen | options,
    )  # fmt: skip
    if layout.in_bytes and (layout.several or layout.filtered or not layout.rounded):
        raise InputError("a kernel for matrices of 8 bits takes one row, no top_k, and a readout of 8 bits")
    sizes = [size for size in RING_SLICES[layout.readout_bits] if D % size == 0]
    sizes = sizes if layout.rounded else [size for size in sizes if layout.out_slice % size == 0]
    if layout.in_bytes or not layout.rounded or layout.dtype != jnp.bfloat16 or layout.out_slice % THREADS:
        options["by_warps"] = False
    if layout.dtype != jnp.bfloat16 or D % (2 * THREADS) or not layout.marks:
        options["short_sums"] = False
    if layout.dtype != jnp.bfloat16 or (layout.chunk, layout.head_size) != (CHUNK, ROWS):
        options["attends_by_warps"] = False
    if not layout.several and layout.longest < GATHERED:  # they are where the state is
        options["attends_by_warps"] = False
    rings = [dict(ring=ring, ring_slice=size) for size in sizes for ring in RINGS]
    if layout.several:
        # Up to `COLUMNS` rows a second chunk is used only if the readout keeps its large pieces and 4 places.
        larger = [one for one in rings if one["ring_slice"] == sizes[0] and one["ring"] > 3]
        rings = [one | dict(chunk_places=2) for one in (rings if layout.rows > COLUMNS else larger)] + rings
    layouts = [dataclasses.replace(layout, **options)]
    if _is_halved(layouts[0], config, told, options):
        layouts = [_halved(layouts[0], options), *(layouts if told is None else [])]
    all_of = [dataclasses.replace(one, **ring | _only(options, ring)) for one in layouts for ring in rings]
    found = next((one for one in all_of if one.fits), None)
    if told and found is None:
        raise InputError(f"a halved layout takes {all_of[-1].shared_bytes:,} bytes of shared memory, too many")
    if layout.rounded and not layout.in_bytes and (layout.filtered or layout.several or found is None):
        return layout_of(config, plan, room, **options | dict(readout_bits=16))
    return found or all_of[-1]


def _is_halved(layout: Layout, config: ModelConfig, told: bool | None, options: dict[str, Any]) -> bool:
    """Whether to halve a layout, which is not halved yet: where it helps, or as `told`. Raises InputError if it is told
    to and cannot be."""
    one_block = config.groups == 1 and not (config.prelude or config.coda)
    alone = layout.rounded and not (layout.several or layout.in_bytes or layout.filtered)
    able = one_block and alone and can_be_halved(layout)
    able = able and options.get("out_slice", layout.width // 2) == layout.width // 2
    if told and not able:
        raise InputError(
            "a layout is halved only for one row of a model of one block, with matrices of 16 bits, a readout of 8 and "
            "no top_k, and only if its pieces would take turns otherwise: leave halved out"
        )
    return able and layout.by_warps and layout.marks if told is None else told


def _halved(layout: Layout, options: dict[str, Any]) -> Layout:
    """Returns a layout with the slices of a halved one, and as few parts of attention as take no longer. Where branches
    are parallel, the programs with more pieces of `down` than others have none, since they multiply meanwhile."""
    chosen: dict[str, Any] = dict(halved=True, out_slice=layout.width // 2)
    halved, chunks = dataclasses.replace(layout, **chosen), layout.room // layout.chunk
    most = -(-chunks // splits(layout.heads, 1, layout.programs - layout.parallel * kept(halved), chunks))
    chosen["chunk_splits"] = -(-chunks // most)
    return dataclasses.replace(layout, **chosen | _only(options, chosen))


def _only(options: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _slice(inputs: int) -> int:
    """Returns the size of a slice, about a third of `inputs`, of which each of `THREADS` threads has the same share."""
    return max(n for n in range(THREADS, max(inputs // 3, THREADS) + 1, THREADS) if inputs % n == 0)

"""The arrays of a model that a kernel reads: matrices with the inputs last, and the vectors of every step of a plan."""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.models.block import Condition
from odelm.models.embed import sinusoid_table
from odelm.models.kernels.layout import MAPS, ROWS, Layout
from odelm.models.lm import CausalLM
from odelm.models.transformer import DepthPlan
from odelm.models.view import rotary_angles
from odelm.ode import Plan

Arrays = dict[str, jax.Array]
ROUNDING = 2.0**-12
"""As a share of |row| |x|: more than all rounding in a row's product, except that of the row to int8."""


def matrices(model: CausalLM, layout: Layout) -> Arrays:
    """Returns the matrices of all blocks, (blocks, outputs, inputs) each, the readout and the embedding (V, D).

    The embedding is float32, the others have the layout's dtype, or int8 with scales (blocks, outputs), float32; of the
    readout see `readout`.
    """
    blocks = [_maps(block) for block in (*model.prelude, *model.blocks, *model.coda)]
    found = {name: jnp.stack([_kernel(maps[name]) for maps in blocks]).astype(layout.block_dtype) for name in MAPS}
    found["down"] = jnp.pad(found["down"], ((0, 0), (0, 0), (0, layout.filled_hidden - layout.hidden)))
    rows = (model.head.tokens if hasattr(model.head, "tokens") else model.embed.tokens)[...]
    scale, embedding = None, model.embed.tokens[...] * model.embed.factor
    if layout.in_bytes:
        head, embed = cast(Any, model.head), cast(Any, model.embed)
        found |= {f"{name}_scale": jnp.stack([_scale(maps[name]) for maps in blocks]) for name in MAPS}
        scale = head.scale[...]
        if hasattr(embed, "scale"):
            embedding = embedding * embed.scale[...][:, None]
    return found | readout(rows, layout, scale) | {"embedding": embedding}


def readout(rows: jax.Array, layout: Layout, scale: jax.Array | None = None) -> Arrays:
    """Returns the rows (V, D) of the readout, cut into pieces of `ROWS` by `ring_slice` inputs, (.., ring_slice), one
    after the other: memory delivers data that is stored together faster.

    Where the layout is `rounded` the pieces are int8, and the rows themselves, and the scale and the bound of each, are
    there too. Rows may be int8 already, with a scale (V,).
    """
    more = layout.vocabulary - rows.shape[0]
    rows = jnp.pad(rows, ((0, more), (0, 0))).astype(rows.dtype if layout.in_bytes else layout.dtype)
    found = {}
    if scale is not None:
        scale = jnp.pad(scale, (0, more), constant_values=1.0)
        error = ROUNDING * scale * jnp.linalg.norm(rows.astype(jnp.float32), axis=1)
        found = {"rows": rows, "row_scale": scale, "row_error": error}
    elif layout.rounded:
        whole, scale, error = rounded_rows(rows)
        found, rows = {"rows": rows, "row_scale": scale, "row_error": error}, whole
    pieces = rows.reshape(-1, ROWS, layout.width // layout.ring_slice, layout.ring_slice)
    return found | {"readout": pieces.swapaxes(1, 2).reshape(-1, layout.ring_slice)}


def rounded_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns rows (V, D) in int8, the scale (V,) of each, and (V,) a bound on the error of its product.

    For any x, |row x - scale int8 x| <= |row - scale int8| |x| (Cauchy and Schwarz). To this bound, which is without
    |x|, `ROUNDING` of the row's length is added, for float32 and the rounding of x (`odelm.models.kernels.rounded`).
    """
    rows = rows.astype(jnp.float32)
    largest = jnp.abs(rows).max(axis=1)
    scale = jnp.where(largest > 1e-30, largest / 127, 1.0)  # and not below what float32 divides by
    whole = jnp.round(rows / scale[:, None])
    missed = jnp.linalg.norm(rows - scale[:, None] * whole, axis=1)
    return whole.astype(jnp.int8), scale, missed + ROUNDING * jnp.linalg.norm(rows, axis=1)


def vectors(model: CausalLM, plan: DepthPlan, layout: Layout) -> Arrays:
    """Returns the vectors of each step, with leading axis N, and those of the positions and of the final norm.

    Biases that are added after a gate are multiplied by it.
    """
    blocks = (*model.prelude, *model.blocks, *model.coda)
    parts = [_steps(i, block, part, layout) for i, (block, part) in enumerate(zip(blocks, plan, strict=True))]
    found = {name: jnp.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert model.final_norm is not None
    end = model.final_norm.affine()
    factor = model.head.factor
    found["end_scale"] = end.scale / factor
    found["end_shift"] = jnp.zeros_like(end.scale) if end.shift is None else end.shift / factor
    return found | _positions(model, layout)


def _steps(number: int, block: Any, part: Plan, layout: Layout) -> Arrays:
    """Returns the vectors of the steps of one `SharedBlock`."""
    N, D, F, K, heads = len(part.sizes), layout.width, layout.hidden, layout.head_size, layout.mapped_heads

    def filled(x: jax.Array | None, shape: tuple[int, ...], default: float) -> jax.Array:
        """Returns (N, ..) in float32, of (..) or (N, ..)."""
        return jnp.full((N, *shape), default) if x is None else jnp.broadcast_to(x.astype(jnp.float32), (N, *shape))

    condition: Condition = jax.tree.map(lambda leaf: leaf[:, 0], part.conditions[0])
    assert condition.norm2 is not None
    gates = [filled(gate, (D,), 1.0) for gate in (condition.gate1, condition.gate2)]
    biases = {name: _bias(maps) for name, maps in _maps(block).items()}
    scales = condition.scales or {}
    of_heads = [scales[name].reshape(N, -1, K) for name in ("qkv", "query", "key_value") if name in scales]
    found = {
        "block": jnp.full((N,), number, jnp.int32), "size": part.sizes.astype(jnp.float32),
        "gate1": gates[0], "gate2": gates[1],
        "out_bias": gates[0] * filled(biases["out"], (D,), 0), "down_bias": gates[1] * filled(biases["down"], (D,), 0),
        "up_bias": filled(biases["up"], (layout.up,), 0), 
        "hidden_scale": jnp.pad(filled(scales.get("hidden"), (F,), 1), ((0, 0), (0, layout.filled_hidden - F))),
    }  # fmt: skip
    for name, norm in (("norm1", condition.norm1), ("norm2", condition.norm2)):
        found |= {f"{name}_scale": filled(norm.scale, (D,), 1), f"{name}_shift": filled(norm.shift, (D,), 0)}
    bias = biases["qkv"]
    found["qkv_bias"] = filled(None if bias is None else bias.reshape(heads, K), (heads, K), 0)
    found["qkv_scale"] = filled(jnp.concatenate(of_heads, 1) if of_heads else None, (heads, K), 1)
    attention = block.attention
    for name, norm in (("query", attention.query_norm), ("key", attention.key_norm)):
        affine = None if norm is None else norm.affine()
        found[f"{name}_scale"] = filled(affine and affine.scale, (K,), 1)
        found[f"{name}_shift"] = filled(affine and affine.shift, (K,), 0)
    return found


def _positions(model: CausalLM, layout: Layout) -> Arrays:
    """Returns the cosines and sines (S, K) of the places of a memory, or what is added to their embeddings (S, D)."""
    config, S, K = model.config, layout.room, layout.head_size
    if layout.rotary:
        cos, sin = rotary_angles(jnp.arange(S), K, config.rotary_base)
        added = jnp.zeros((S, layout.width))
        return {
            "cos": jnp.concatenate([cos, cos], -1),
            "sin": jnp.concatenate([-sin, sin], -1),
            "position": added,
        }
    learned = config.positions == "learned"
    table = model.embed.learned[...] if learned else sinusoid_table(config.max_length, layout.width)
    table = jnp.pad(table, ((0, max(0, S - len(table))), (0, 0)))[:S] * model.embed.factor
    return {"cos": jnp.ones((1, K)), "sin": jnp.zeros((1, K)), "position": table}


def _maps(block: Any) -> dict[str, list[Any]]:
    """Returns the linear maps of a `SharedBlock`, by the names of `MAPS`."""
    attention, feedforward = block.attention, block.feedforward
    first = [attention.qkv] if attention.qkv is not None else [attention.query, attention.key_value]
    return dict(zip(MAPS, (first, [attention.out], [feedforward.up], [feedforward.down]), strict=True))


def _kernel(maps: list[Any]) -> jax.Array:
    """Returns (outputs, inputs) of linear maps of the same inputs, one under the other."""

    def turned(linear: Any) -> jax.Array:
        kernel = linear.kernel[...]
        inputs = len(linear.axis) if isinstance(linear, nnx.LinearGeneral) else getattr(linear, "inputs", 1)
        return kernel.reshape(math.prod(kernel.shape[:inputs]), -1).T

    return jnp.concatenate([turned(linear) for linear in maps])


def _scale(maps: list[Any]) -> jax.Array:
    """Returns the scales (outputs,) of quantised linear maps, one after the other."""
    return jnp.concatenate([linear.scale[...].reshape(-1) for linear in maps])


def _bias(maps: list[Any]) -> jax.Array | None:
    if maps[0].bias is None:
        return None
    return jnp.concatenate([linear.bias[...].reshape(-1).astype(jnp.float32) for linear in maps])

"""Queries and keys of a new token, which are normalised and turned by its position."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.layout import ROWS
from odelm.models.kernels.marked import ROW
from odelm.models.kernels.plain import vector
from odelm.models.kernels.program import Program
from odelm.models.kernels.several import across, by_column, by_groups, columns_at, total
from odelm.models.kernels.tokens import TEXTS, Newest, Tokens

plgpu: Any = mosaic_gpu


def of_positions(p: Program, name: str, token: Newest) -> jax.Array:
    """Returns the cosines or sines of the tokens' positions, in the shape of a product's result."""
    if isinstance(token, Tokens) and p.marked:
        positions = token.texts.at[TEXTS.index("position")]
        return columns_at(p.vectors[name], positions, token.number, p.layout.columns)
    found = [vector(p.vectors[name].at[token.of(row).position]) for row in range(p.layout.rows)]
    return by_column(found) if p.layout.several else found[0]


def placed(p: Program, x: jax.Array, given: tuple[jax.Array, ...], *, is_query: jax.Array) -> jax.Array:
    """Returns a query or key (K,), normalised and turned by its position; the query divided by the root of its size.

    The constants are the scales of queries and of keys, their shifts, cosines and sines, as far as the layout has them.
    """
    layout, K = p.layout, p.layout.head_size
    share = is_query.astype(jnp.float32)
    if layout.qk_norm:
        scale, shift = (query * share + key * (1 - share) for query, key in (given[:2], given[2:4]))
        mean = total(x) / K if layout.norm == "layernorm" else 0.0
        root = lax.rsqrt(total((x - mean) * (x - mean)) / K + layout.eps)
        x = (x - mean) * root * across(scale, x) + across(shift, x)
    if layout.rotary:
        cos, sin = given[-2:]
        x = x * cos + _turned(p, x) * sin
    return x * jnp.where(is_query, K**-0.5, 1.0)


def _turned(p: Program, x: jax.Array) -> jax.Array:
    """Returns the outputs of a tile (`ROWS`, ..) with its halves swapped."""

    def swapped(some: jax.Array) -> jax.Array:
        near, half = p.near["turned"], ROWS // 2
        near.at[pl.ds(0, ROWS)][...] = some
        near.at[pl.ds(ROWS, ROWS)][...] = some
        return vector(near.at[pl.ds(half, ROWS)], plgpu.Layout.WGMMA if p.layout.several else ROW)

    return by_groups(swapped, x) if p.layout.several else swapped(x)

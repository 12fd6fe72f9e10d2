"""Vectors of several rows of the batch, which are the columns of a product's right side and of its result."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.layout import COLUMNS, ROWS, THREADS

plgpu: Any = mosaic_gpu
Ref = Any
MOST_WORDS = 64
"""Words that each thread may be reading at once, at two registers each."""


def beside(n: int) -> Any:
    """Returns the layout of (`COLUMNS`, n) in which a thread has the same inputs of every row of the batch."""
    length = 2 if n % (2 * THREADS) == 0 else 1
    tiling = Tiling(((COLUMNS, length * THREADS), (32 * length,), (length,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def across(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns a vector (`ROWS`,) for each column of a product's result, if that has columns."""
    return x if y.ndim == 1 else lax.broadcast_in_dim(x, y.shape, (0,))


def total(x: jax.Array) -> jax.Array:
    """Returns the sum over the outputs of a tile: for (`ROWS`,) one number, for (`ROWS`, `COLUMNS`) one per column,
    repeated over its rows."""
    return jnp.sum(x) if x.ndim == 1 else lax.broadcast_in_dim(jnp.sum(x, axis=0), x.shape, (1,))


def column_of(x: jax.Array, row: int) -> jax.Array:
    """Returns one column (`ROWS`,) of (`ROWS`, `COLUMNS`)."""
    return jnp.sum(jnp.where(_columns() == row, x, 0.0), axis=1)


def by_column(vectors: list[jax.Array]) -> jax.Array:
    """Returns (`ROWS`, `COLUMNS`) with vectors (`ROWS`,) as the first columns and zeros in the others."""
    column, shape = _columns(), (ROWS, COLUMNS)
    found = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    for row, x in enumerate(vectors):
        found = jnp.where(column == row, lax.broadcast_in_dim(x, shape, (0,)), found)
    return found


def receive_by_row(
    program: Any, places: Callable[[int], list[tuple[Any, ...]]], mark: jax.Array
) -> list[list[jax.Array]]:
    """Returns for each row the vectors published at `places(row)`, read together as far as there are registers."""
    layout, first = program.layout, places(0)
    words = program.between[first[0][0]].at[tuple(first[0][1:])].shape[0]
    at_once = max(1, MOST_WORDS // (len(first) * max(1, words // THREADS)))
    found: list[list[jax.Array]] = []
    for start in range(0, layout.rows, at_once):
        rows = range(start, min(start + at_once, layout.rows))
        every = [place for row in rows for place in places(row)]
        some = program.receive(*every, mark=mark, layout=beside(words).reduce(0))
        found += [some[i : i + len(first)] for i in range(0, len(some), len(first))]
    return found


def take_rows(vectors: list[jax.Array], inputs: Ref) -> None:
    """Writes vectors (n,) of `beside` into the columns of the right side of a product, (`COLUMNS`, n), and zeros."""
    n, dtype = inputs.shape[1], inputs.dtype
    layout = beside(n)
    row = plgpu.broadcasted_iota(jnp.int32, inputs.shape, 0, layout=layout)
    found = plgpu.layout_cast(jnp.zeros(inputs.shape, dtype), layout)
    for number, x in enumerate(vectors):
        found = jnp.where(row == number, lax.broadcast_in_dim(x.astype(dtype), inputs.shape, (1,)), found)
    inputs[...] = found


def _columns() -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), 1, layout=plgpu.Layout.WGMMA)

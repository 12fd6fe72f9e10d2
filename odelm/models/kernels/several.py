"""Vectors of several rows of the batch, which are the columns of a product's right side and of its result."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
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
    """Returns the sum over the outputs of a tile: for (`ROWS`,) one number, for (`ROWS`, columns) one per column,
    repeated over its rows."""
    return jnp.sum(x) if x.ndim == 1 else lax.broadcast_in_dim(jnp.sum(x, axis=0), x.shape, (1,))


def column_of(x: jax.Array, row: int) -> jax.Array:
    """Returns one column (`ROWS`,) of (`ROWS`, columns)."""
    group = row // COLUMNS * COLUMNS
    few = lax.slice(x, (0, group), (ROWS, group + COLUMNS))
    return jnp.sum(jnp.where(_columns() == row - group, few, 0.0), axis=1)


def by_column(vectors: list[jax.Array]) -> jax.Array:
    """Returns (`ROWS`, columns) with vectors (`ROWS`,) as the first columns and zeros in the others."""
    column, shape = _columns(), (ROWS, COLUMNS)
    groups = []
    for start in range(0, len(vectors), COLUMNS):
        found = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        for number, x in enumerate(vectors[start : start + COLUMNS]):
            found = jnp.where(column == number, lax.broadcast_in_dim(x, shape, (0,)), found)
        groups.append(found)
    return beside_each_other(groups)


def by_groups(work: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Returns (`ROWS`, columns), the result of `work` on `COLUMNS` columns at a time."""
    starts = range(0, x.shape[1], COLUMNS)
    return beside_each_other([work(lax.slice(x, (0, start), (ROWS, start + COLUMNS))) for start in starts])


def beside_each_other(groups: list[jax.Array]) -> jax.Array:
    """Returns (`ROWS`, columns), made of arrays of `COLUMNS` columns."""
    return groups[0] if len(groups) == 1 else lax.concatenate(groups, 1)


def take_received(
    program: Any,
    places: Callable[[int], list[tuple[Any, ...]]],
    finish: Callable[..., jax.Array],
    inputs: Ref,
    mark: jax.Array,
) -> None:
    """Writes for each row `finish` of the vectors published at `places(row)` into the columns of the right side of a
    product, (columns, n), and zeros into the others."""
    rows = program.layout.rows
    for start in range(0, rows, COLUMNS):
        some = _received(program, places, range(start, min(start + COLUMNS, rows)), mark)
        _take([finish(*found) for found in some], inputs.at[pl.ds(start, COLUMNS)])


def _received(
    program: Any, places: Callable[[int], list[tuple[Any, ...]]], rows: range, mark: jax.Array
) -> list[list[jax.Array]]:
    """Returns for each of the rows the vectors published at `places(row)`, read together as far as there are
    registers."""
    first = places(0)
    words = program.place(*first[0]).shape[0]
    at_once = max(1, MOST_WORDS // (len(first) * max(1, words // THREADS)))
    size = words * (2 if program.paired(first[0][0]) else 1)
    found: list[list[jax.Array]] = []
    for start in range(0, len(rows), at_once):
        every = [place for row in rows[start : start + at_once] for place in places(row)]
        some = program.receive(*every, mark=mark, layout=beside(size).reduce(0))
        found += [some[i : i + len(first)] for i in range(0, len(some), len(first))]
    return found


def _take(vectors: list[jax.Array], inputs: Ref) -> None:
    """Writes vectors (n,) of `beside` into `COLUMNS` columns of the right side of a product, (`COLUMNS`, n), and
    zeros."""
    n, dtype = inputs.shape[1], inputs.dtype
    layout = beside(n)
    row = plgpu.broadcasted_iota(jnp.int32, inputs.shape, 0, layout=layout)
    found = plgpu.layout_cast(jnp.zeros(inputs.shape, dtype), layout)
    for number, x in enumerate(vectors):
        found = jnp.where(row == number, lax.broadcast_in_dim(x.astype(dtype), inputs.shape, (1,)), found)
    inputs[...] = found


def _columns() -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), 1, layout=plgpu.Layout.WGMMA)

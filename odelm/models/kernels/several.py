"""Vectors of several rows of the batch, which are the columns of a product's right side and of its result."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.mosaic.gpu.utils import dtype_to_ir_type
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from odelm.models.kernels.layout import COLUMNS, ROWS, THREADS
from odelm.models.kernels.signals import mosaic

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


def columns_at(table: Ref, places: Ref, more: jax.Array, columns: int) -> jax.Array:
    """Returns float32 (`ROWS`, columns), the n-th column of which is the row `places[n] + more` of a table (S, `ROWS`).

    `by_column` of as many vectors is several operations for each of them, and Pallas infers layouts for every
    operation, which takes most of the time of compiling.
    """

    def gather(context: Any, table: Any, places: Any, more: Any) -> Any:
        del context
        layout, f32, i32 = plgpu.Layout.WGMMA.to_mgpu(), ir.F32Type.get(), ir.IntegerType.get_signless(32)
        (rows, start), number = (mosaic.memref_ptr(ref) for ref in (table, places)), more.registers.item()
        two = ir.VectorType.get((2,), f32)
        registers = np.empty(layout.registers_shape((ROWS, columns)), dtype=object)
        starts = layout.thread_idxs((ROWS, columns))
        for index, (row, column) in zip(np.ndindex(registers.shape), starts, strict=True):
            found = []
            for i in range(2):
                its = arith.addi(arith.index_cast(i32, column), arith.constant(i32, i))
                place = arith.addi(llvm.load(i32, mosaic.getelementptr(start, [its], i32)), number)
                of = arith.addi(arith.muli(place, arith.constant(i32, ROWS)), arith.index_cast(i32, row))
                found.append(llvm.load(f32, mosaic.getelementptr(rows, [of], f32)))
            registers[index] = vector.from_elements(two, found)
        return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    types = plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT
    shape = plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, layout=plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(arg_types=types, return_type=shape)(gather)(table, places, more)


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
        _take([finish(*found) for found in some], inputs.at[pl.ds(start, COLUMNS)], at_once=program.marked)


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


def _take(vectors: list[jax.Array], inputs: Ref, *, at_once: bool) -> None:
    """Writes vectors (n,) of `beside` into `COLUMNS` columns of the right side of a product, (`COLUMNS`, n), and zeros.

    With `at_once` this is one operation, not two a row: the instructions are the same, but Pallas infers layouts for
    every operation, which takes most of the time of compiling. The interpreter cannot do it.
    """
    n, dtype = inputs.shape[1], inputs.dtype
    layout = beside(n)
    if at_once:
        inputs[...] = _stacked([x.astype(dtype) for x in vectors], layout)
        return
    row = plgpu.broadcasted_iota(jnp.int32, inputs.shape, 0, layout=layout)
    found = plgpu.layout_cast(jnp.zeros(inputs.shape, dtype), layout)
    for number, x in enumerate(vectors):
        found = jnp.where(row == number, lax.broadcast_in_dim(x.astype(dtype), inputs.shape, (1,)), found)
    inputs[...] = found


def _stacked(vectors: list[jax.Array], layout: Any) -> jax.Array:
    """Returns (`COLUMNS`, n) in the layout `beside(n)`, with vectors (n,) as the first rows and zeros in the others: a
    thread's numbers of a row are those that it has of the vector."""
    n, dtype = vectors[0].shape[0], vectors[0].dtype

    def stack(context: Any, *given: Any) -> Any:
        del context
        places = layout.to_mgpu()
        zeros = FragmentedArray.splat(_zero(dtype), (n,), layout=layout.reduce(0).to_mgpu())
        rows = [*given, *[zeros] * (COLUMNS - len(given))]
        registers = np.empty(places.registers_shape((COLUMNS, n)), dtype=object)
        for index in np.ndindex(registers.shape):
            registers[index] = rows[index[2]].registers.flat[index[1]]
        return FragmentedArray(_registers=registers, _layout=places, _is_signed=None)

    shape = plgpu.ShapeDtypeStruct((COLUMNS, n), dtype, layout=layout)
    return plgpu.inline_mgpu(arg_types=(layout.reduce(0),) * len(vectors), return_type=shape)(stack)(*vectors)


def _zero(dtype: Any) -> Any:
    kind = dtype_to_ir_type(dtype)
    return arith.constant(kind, ir.FloatAttr.get(kind, 0.0))


def _columns() -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), 1, layout=plgpu.Layout.WGMMA)

"""A program's part of attention, where each warp multiplies its own places by tensor-core instructions (`mma.sync`).

A warp has 16 places of each chunk of 64. Its left side for the scores is the query: of 16 rows the upper eight are the
query rounded to bfloat16, the lower eight what the rounding left, so that a score is the sum of two rows. The scores
come out in the registers where the right side of the next product has to be. Its left side is the values of the 16
places, turned; its eight columns are, by turns, the weights rounded to bfloat16, and what is left of them. So queries
and weights are accurate to about 2^-17, at no cost: the rows and columns would be equal otherwise (PTX, "Matrix
Fragments for mma.m16n8k16").

No warp needs another's numbers before the end of a part, when what they have is added up. A chunk's place in shared
memory is filled again by a copy, which begins when all warps have read it: every copy first waits for all of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from odelm.models.kernels.attend_ptx import collect_text, halves_text, leave_text, scores_text, values_text
from odelm.models.kernels.by_warps import PLACED, shared_address
from odelm.models.kernels.layout import THREADS
from odelm.models.kernels.marked import COLUMN, strided, thread
from odelm.models.kernels.program import Program
from odelm.models.kernels.signals import CONVERGENT, mosaic

plgpu: Any = mosaic_gpu
Ref = Any
Running = tuple[jax.Array, jax.Array, jax.Array]
"""Over the chunks so far: the largest score, the sum of exp(score - largest), and values weighted by the same. Of each
thread: the largest score of its warp (`THREADS`,), the sum of four places (`THREADS`,), and 16 sums of values (16
`THREADS`,)."""
SPLAT = plgpu.Layout.WG_SPLAT


class ByWarps:
    """Averages the values of a head's places for one query."""

    def __init__(self, program: Program, query: jax.Array, least: float):
        """Takes a query (64,), and the score of places that are not attended to."""
        self.query, self.least = _halves(query), least
        self.scratch = program.near["turned" if program.layout.several else "state"]

    def nothing(self) -> Running:
        """Returns the running average before the first chunk."""
        zeros = [plgpu.layout_cast(jnp.zeros(n * THREADS, jnp.float32), strided(n * THREADS)) for n in (1, 16)]
        return zeros[0] + self.least, *zeros

    def scores(self, near: dict[str, Ref], start: jax.Array, end: jax.Array) -> jax.Array:
        """Returns the scores of a chunk that is in shared memory, from the place `start` on; those of places from `end`
        on are `least`."""
        return _scores(near["keys"], near["hidden"], self.query, start, end, self.least)

    def with_values(self, near: dict[str, Ref], scores: jax.Array, running: Running) -> Running:
        """Returns the running average after adding a chunk, whose values are in shared memory."""
        return _with_values(near["values"], scores, running)

    def added_up(self, running: Running) -> Running:
        """Returns the largest score, the sum of exp(score - largest), and the values (64,) weighted by the same, over
        all places."""
        return _added_up(running, self.scratch)


def _halves(query: jax.Array) -> jax.Array:
    """Returns a query (64,) as the left side of the products with keys, int32 (16 `THREADS`,)."""

    def split(context: Any, query: Any) -> Any:
        del context
        return _array(mosaic.inline_ptx(halves_text(), *_numbers(query), result_types=[_i32()] * 16), jnp.int32)

    shape = plgpu.ShapeDtypeStruct((16 * THREADS,), jnp.int32, layout=strided(16 * THREADS))
    return plgpu.inline_mgpu(arg_types=(COLUMN,), return_type=shape)(split)(query)


def _scores(keys: Ref, hidden: Ref, query: jax.Array, start: jax.Array, end: jax.Array, least: float) -> jax.Array:
    """Returns the scores of a chunk, four of each thread, float32 (4 `THREADS`,); those of places from `end` on, where
    the first place is `start`, are `least`. `query` is what `_halves` returned."""

    def multiply(context: Any, keys: Any, hidden: Any, query: Any, start: Any, end: Any) -> Any:
        del context
        given = shared_address(keys), shared_address(hidden), thread(), start.registers.item(), end.registers.item()
        results = dict(result_types=[ir.F32Type.get()] * 4, has_side_effects=True, **CONVERGENT)
        return _array(mosaic.inline_ptx(scores_text(least), *given, *_numbers(query), **results), jnp.float32)

    types = PLACED, plgpu.RefType(), strided(16 * THREADS), SPLAT, SPLAT
    shape = plgpu.ShapeDtypeStruct((4 * THREADS,), jnp.float32, layout=strided(4 * THREADS))
    return plgpu.inline_mgpu(arg_types=types, return_type=shape)(multiply)(keys, hidden, query, start, end)


def _with_values(values: Ref, found: jax.Array, running: Running) -> Running:
    """Returns the running average after adding a chunk, whose scores have been `found`."""

    def multiply(context: Any, values: Any, *arrays: Any) -> Any:
        del context
        given = [number for array in arrays for number in _numbers(array)]
        results = dict(result_types=[ir.F32Type.get()] * 18, has_side_effects=True, **CONVERGENT)
        top, total, *context = mosaic.inline_ptx(values_text(), shared_address(values), thread(), *given, **results)
        return tuple(_array(numbers, jnp.float32) for numbers in ([top], [total], context))

    places = [strided(n * THREADS) for n in (1, 1, 16)]
    shapes = tuple(plgpu.ShapeDtypeStruct((n * THREADS,), jnp.float32, layout=strided(n * THREADS)) for n in (1, 1, 16))
    types = PLACED, strided(4 * THREADS), *places
    return plgpu.inline_mgpu(arg_types=types, return_type=shapes)(multiply)(values, found, *running)


def _added_up(running: Running, scratch: Ref) -> Running:
    """Returns what `ByWarps.added_up` does; `scratch` is shared memory for `layout.GATHERED` numbers of float32, which
    nothing else uses meanwhile."""

    def add(context: Any, scratch: Any, *arrays: Any) -> Any:
        del context
        given = [number for array in arrays for number in _numbers(array)]
        base, me = shared_address(scratch), thread()
        mosaic.warpgroup_barrier()
        mosaic.inline_ptx(leave_text(), base, me, *given, has_side_effects=True, **CONVERGENT)
        mosaic.warpgroup_barrier()
        results = dict(result_types=[ir.F32Type.get()] * 18, has_side_effects=True)
        top, total, *values = mosaic.inline_ptx(collect_text(), base, me, **results)
        return FragmentedArray.splat(top, ()), FragmentedArray.splat(total, ()), _array(values, jnp.float32, COLUMN)

    number = plgpu.ShapeDtypeStruct((), jnp.float32, layout=SPLAT)
    shapes = number, number, plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=COLUMN)
    types = plgpu.RefType(), *[strided(n * THREADS) for n in (1, 1, 16)]
    return plgpu.inline_mgpu(arg_types=types, return_type=shapes)(add)(scratch, *running)


def _numbers(x: Any) -> list[Any]:
    """Returns the numbers that a thread has of an array."""
    found = []
    for register in x.registers.flat:
        found += [
            vector.extract(register, dynamic_position=[], static_position=[i]) for i in range(register.type.shape[0])
        ]
    return found


def _array(numbers: Any, dtype: Any, layout: Any = None) -> Any:
    """Returns an array, given the numbers that a thread has of it; by default `strided`."""
    numbers = list(numbers)
    kind = numbers[0].type
    n = len(numbers) * THREADS if layout is None else 64
    places = (strided(n) if layout is None else layout).to_mgpu()
    shape = places.registers_shape((n,))
    length = len(numbers) // int(np.prod(shape))
    registers = np.empty(shape, dtype=object)
    for i, place in enumerate(np.ndindex(shape)):
        registers[place] = vector.from_elements(
            ir.VectorType.get((length,), kind), numbers[length * i : length * (i + 1)]
        )
    return FragmentedArray(_registers=registers, _layout=places, _is_signed=True if dtype == jnp.int32 else None)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)

"""Marked numbers by twos: where every reader rounds a number to bfloat16, a word of 64 bits holds two and a mark.

Several rows of the batch make programs read much: at each step all programs read what enters their product from all
rows. In words of `odelm.models.kernels.marked` this is 8 bytes a number, here 4. The writer rounds, as the reader would
have done.

An array of n numbers is int32 (.., n / 2, 2): two of bfloat16, the first one in the lower bits, and a mark.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from odelm.models.kernels.marked import address, loop_text, thread, writer
from odelm.models.kernels.signals import CONVERGENT, mosaic

plgpu: Any = mosaic_gpu
Ref = Any
ROUND = "cvt.rn.bf16x2.f32 lower, high, low; mov.b32 upper, MARK;"
"""PTX that makes a word of two numbers and a mark: see `columns_text`."""


def put_paired(x: jax.Array, ref: Ref, mark: jax.Array, layout: Any) -> None:
    """Writes float32 (n,) with a mark, as `marked.put_marked` does, in a layout whose threads hold two neighbouring
    numbers at a time."""
    of = writer(layout)

    def write(context: Any, x: Any, ref: Any, mark: Any) -> None:
        del context
        of.begin()
        base, me = start_of(ref), thread()
        for number, (places, register) in enumerate(zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True)):
            mine = of.mine(me, number)
            given = [base, i32_of(places[0]), *_both(register), mark.registers.item()]
            chosen = [] if mine is None else [mine]
            mosaic.inline_ptx(put_text(chosen=bool(chosen)), *given, *chosen, has_side_effects=True)

    splat = plgpu.Layout.WG_SPLAT
    plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), splat))(write)(x, ref, mark)


def put_columns_paired(
    x: jax.Array, ref: Ref, stride: int, columns: int, mark: jax.Array, *, pack: str = ROUND
) -> None:
    """Writes the first columns of a product, float32 (n, columns), with a mark: each column becomes n / 2 neighbouring
    words, the first column's at `ref`, each next column's `stride` words after the one before.

    A thread has two columns of a row, and its neighbour four lanes away those of the next row: they exchange one number
    each, so that one has both rows of the first column, the other both rows of the second. `pack` is as in
    `columns_text`.
    """

    def write(context: Any, x: Any, ref: Any, mark: Any) -> None:
        del context
        base, text = start_of(ref), columns_text(stride, columns, pack)
        for places, register in zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True):
            given = [base, *map(i32_of, places), *_both(register), mark.registers.item()]
            mosaic.inline_ptx(text, *given, has_side_effects=True, **CONVERGENT)

    splat = plgpu.Layout.WG_SPLAT
    plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), splat))(write)(x, ref, mark)


def put_text(*, chosen: bool) -> str:
    """Returns the PTX that writes a word: $0 is the address of the vector, $1 the index of the first of two numbers, $2
    and $3 are the numbers, $4 the mark, and with `chosen` $5 says whether to write."""
    return f"""{{ .reg .b32 pair, at; .reg .b64 place, word;
shr.u32 at, $1, 1; mul.wide.u32 place, at, 8; add.u64 place, place, $0;
cvt.rn.bf16x2.f32 pair, $3, $2; mov.b64 word, {{pair, $4}}; {"@$5 " if chosen else ""}{STORE} }}"""


def columns_text(stride: int, columns: int, pack: str = ROUND) -> str:
    """Returns the PTX that writes a word of a column: $0 is the address of the first column, $1 a row and $2 the first
    of two columns of a product, whose numbers are $3 and $4, and $5 is the mark. The thread of an odd row writes the
    second column, that of the row before the first. `pack` makes the registers `lower` and `upper` of a word from
    `low`, `high` and the mark, and may use `first` and `second`."""
    return f"""{{ .reg .b32 odd, of, at, first, second, lower, upper; .reg .f32 sent, got, low, high;
.reg .b64 place, word; .reg .pred other, mine;
and.b32 odd, $1, 1; setp.ne.u32 other, odd, 0; add.u32 of, $2, odd; setp.lt.u32 mine, of, {columns};
shr.u32 at, $1, 1; mad.lo.u32 at, of, {stride}, at; mul.wide.u32 place, at, 8; add.u64 place, place, $0;
selp.f32 sent, $3, $4, other; shfl.sync.bfly.b32 got, sent, 4, 0x1f, 0xffffffff;
selp.f32 low, got, $3, other; selp.f32 high, $4, got, other;
{pack.replace("MARK", "$5")} mov.b64 word, {{lower, upper}}; @mine {STORE} }}"""


STORE = "st.relaxed.gpu.global.b64 [place], word;"


def read_paired(refs: Sequence[Ref], mark: jax.Array, layout: Any) -> list[jax.Array]:
    """Returns bfloat16 (n,) of each of `refs` of the same n, as soon as all of them have the mark, in a layout whose
    threads hold two neighbouring numbers at a time; the array expected last should be the last of `refs`."""
    n = 2 * refs[-1].shape[0]
    shape = plgpu.ShapeDtypeStruct((n,), jnp.bfloat16, layout=layout)

    def read(context: Any, *arguments: Any) -> Any:
        del context
        *given, mark = arguments
        return _read(given, n, layout.to_mgpu(), mark.registers.item())

    types = (*[plgpu.RefType()] * len(refs), plgpu.Layout.WG_SPLAT)
    return list(plgpu.inline_mgpu(arg_types=types, return_type=(shape,) * len(refs))(read)(*refs, mark))


def _read(refs: Sequence[Any], n: int, layout: Any, mark: Any) -> Any:
    starts, shape = [places[0] for places in layout.thread_idxs((n,))], layout.registers_shape((n,))
    two = ir.VectorType.get((2,), ir.BF16Type.get())
    assert layout.registers_element_type(ir.BF16Type.get()) == two, "a thread holds two neighbouring numbers"
    bases = [address(mosaic.memref_ptr(ref), half(starts[0])) for ref in refs]
    count, i32 = len(refs) * len(starts), ir.IntegerType.get_signless(32)
    text = loop_text(len(refs), len(starts), 1, n // 2 // len(starts), outputs=count)
    found = mosaic.inline_ptx(text, *bases, mark, result_types=[i32] * count, has_side_effects=True)
    arrays = []
    for first in range(0, count, len(starts)):
        registers = np.empty(shape, dtype=object)
        for place, word in zip(np.ndindex(shape), found[first : first + len(starts)], strict=True):
            registers[place] = vector.bitcast(two, vector.from_elements(ir.VectorType.get((1,), i32), [word]))
        arrays.append(FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
    return tuple(arrays)


def half(place: Any) -> Any:
    """Returns half of an index."""
    return arith.shrui(place, arith.constant(ir.IndexType.get(), 1))


def i32_of(place: Any) -> Any:
    """Returns an index as int32."""
    return arith.index_cast(ir.IntegerType.get_signless(32), place)


def start_of(ref: Any) -> Any:
    """Returns the address of an array."""
    return address(mosaic.memref_ptr(ref), arith.constant(ir.IndexType.get(), 0))


def _both(register: Any) -> list[Any]:
    """Returns the two numbers of a register."""
    return [vector.extract(register, dynamic_position=[], static_position=[i]) for i in range(2)]

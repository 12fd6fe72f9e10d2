"""Numbers passed between programs in global memory, each with a mark that says when it was written.

A reader polls until all marks are those of the present step, so that no separate signal is needed, and a program waits
only for the programs from which it reads. A number and its mark are one word of 64 bits, which is written and read as a
whole (PTX, "Memory consistency model"; NCCL passes data in the same way in its protocol LL).

An array of n numbers is int32 (.., n, 2): the bits of a float32, and a mark, which is never 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, vector

from odelm.models.kernels.signals import mosaic

plgpu: Any = mosaic_gpu
Ref = Any
COLUMN, ROW = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)
"""How a warpgroup holds a vector: as one row of a matrix (one number a column), or as one column of it."""


def strided(n: int) -> Any:
    """Returns the layout in which a thread holds neighbouring numbers, which no other thread holds."""
    return plgpu.Layout.WG_STRIDED((n,), 2 if n % 256 == 0 else 1)


def put_marked(x: jax.Array, ref: Ref, mark: jax.Array, layout: Any) -> None:
    """Writes float32 (n,) with a mark, int32 (). In the layout each number is held once, or the numbers are those of a
    column or a row of a product."""
    of = writer(layout)

    def write(context: Any, x: Any, ref: Any, mark: Any) -> None:
        del context
        of.begin()
        base, me = mosaic.memref_ptr(ref), thread()
        for number, (places, register) in enumerate(zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True)):
            mine = of.mine(me, number)
            for i in range(register.type.shape[0]):
                value = vector.extract(register, dynamic_position=[], static_position=[i])
                given = [address(base, places[0], i), value, mark.registers.item(), *([] if mine is None else [mine])]
                mosaic.inline_ptx(_STORE if mine is None else _STORE_MINE, *given, has_side_effects=True)

    splat = plgpu.Layout.WG_SPLAT
    plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), splat))(write)(x, ref, mark)


def put_columns_marked(x: jax.Array, ref: Ref, stride: int, columns: int, mark: jax.Array) -> None:
    """Writes the first columns of a product, float32 (n, columns), with a mark: each column becomes n neighbouring
    words, the first column's at `ref`, each next column's `stride` words after the one before."""

    def write(context: Any, x: Any, ref: Any, mark: Any) -> None:
        del context
        base, index = mosaic.memref_ptr(ref), ir.IndexType.get()
        for (row, column), register in zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True):
            for i in range(register.type.shape[0]):
                value = vector.extract(register, dynamic_position=[], static_position=[i])
                of = arith.addi(column, arith.constant(index, i))
                place = arith.addi(arith.muli(of, arith.constant(index, stride)), row)
                mine = arith.cmpi(arith.CmpIPredicate.ult, of, arith.constant(index, columns))
                given = [address(base, place), value, mark.registers.item(), mine]
                mosaic.inline_ptx(_STORE_MINE, *given, has_side_effects=True)

    splat = plgpu.Layout.WG_SPLAT
    plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), splat))(write)(x, ref, mark)


@dataclass(frozen=True)
class Writer:
    """Which threads write the numbers of a vector that several threads have."""

    mine: Callable[[Any, int], Any]
    """Returns, for a thread and the number of a register, whether the thread writes it; None if it always does."""
    begin: Callable[[], None] = lambda: None
    """To be called before the first number is written."""


def writer(layout: Any) -> Writer:
    """Returns which threads write a vector of a layout: see `put_marked`."""
    if layout == COLUMN:  # only one warp writes: the others must have read what its numbers replace elsewhere
        return Writer(_of_column, mosaic.warpgroup_barrier)
    return Writer(_of_row if layout == ROW else lambda thread, number: None)


def _of_row(thread: Any, number: int) -> Any:
    """Whether a thread is the one of four neighbours with the same numbers that writes them."""
    del number
    return arith.cmpi(arith.CmpIPredicate.eq, arith.andi(thread, _number(3)), _number(0))


def _of_column(thread: Any, number: int) -> Any:
    """Whether a thread is one of the four that write a register, among all threads with the same numbers."""
    return arith.cmpi(arith.CmpIPredicate.eq, arith.shrui(thread, _number(2)), _number(number))


_STORE = "{ .reg .b64 word; mov.b64 word, {$1, $2}; st.relaxed.gpu.global.b64 [$0], word; }"
_STORE_MINE = "{ .reg .b64 word; mov.b64 word, {$1, $2}; @$3 st.relaxed.gpu.global.b64 [$0], word; }"


def read_marked(refs: Sequence[Ref], mark: jax.Array, layout: Any = None, *, together: bool = False) -> list[jax.Array]:
    """Returns float32 (n,) of each of `refs` of the same n, as soon as all of them have the mark; in a layout, by
    default that in which each number is held once. The array expected last should be the last of `refs`: until it is
    complete, only it is read, unless all are read `together`, which takes less time where they are there already."""
    n = refs[-1].shape[0]
    places = strided(n) if layout is None else layout
    shape = plgpu.ShapeDtypeStruct((n,), jnp.float32, layout=places)

    def read(context: Any, *arguments: Any) -> Any:
        del context
        *given, mark = arguments
        return _read(given, n, places, mark.registers.item(), together=together)

    types = (*[plgpu.RefType()] * len(refs), plgpu.Layout.WG_SPLAT)
    return list(plgpu.inline_mgpu(arg_types=types, return_type=(shape,) * len(refs))(read)(*refs, mark))


def _read(refs: Sequence[Any], n: int, layout: Any, mark: Any, *, together: bool) -> Any:
    layout = layout.to_mgpu()
    starts = [places[0] for places in layout.thread_idxs((n,))]
    shape = layout.registers_shape((n,))
    length = layout.registers_element_type(ir.F32Type.get()).shape[0]
    bases = [address(mosaic.memref_ptr(ref), starts[0]) for ref in refs]
    step = n // len(starts)  # from the numbers of one register to those of the next
    count = len(refs) * len(starts) * length
    text = loop_text(len(refs), len(starts), length, step, outputs=count, together=together)
    found = mosaic.inline_ptx(text, *bases, mark, result_types=[ir.F32Type.get()] * count, has_side_effects=True)
    arrays = []
    for r in range(len(refs)):
        registers = np.empty(shape, dtype=object)
        for i, place in enumerate(np.ndindex(shape)):
            first = (r * len(starts) + i) * length
            of_register = ir.VectorType.get((length,), ir.F32Type.get())
            registers[place] = vector.from_elements(of_register, list(found[first : first + length]))
        arrays.append(FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
    return tuple(arrays)


def loop_text(refs: int, registers: int, length: int, step: int, outputs: int, *, together: bool = False) -> str:
    """Returns PTX that reads words until all have the mark, at first only those of the last array unless `together`:
    `length` words beside each other for each of so many registers, which are `step` words apart."""

    def load(ref: int) -> list[str]:
        lines = []
        for i in range(registers):
            first = (ref * registers + i) * length
            address = f"[${outputs + ref} + {8 * step * i}]"
            if length == 2:
                lines.append(f"ld.relaxed.gpu.global.v2.b64 {{w{first}, w{first + 1}}}, {address};")
            else:
                lines.append(f"ld.relaxed.gpu.global.b64 w{first}, {address};")
        return lines

    def check(ref: int) -> list[str]:
        lines = []
        for word in range(ref * registers * length, (ref + 1) * registers * length):
            lines.append(f"mov.b64 {{${word}, m}}, w{word}; xor.b32 m, m, ${outputs + refs}; or.b32 all, all, m;")
        return lines

    some = range(refs)
    return "{ " + polling_text([load(ref) for ref in some], [check(ref) for ref in some], outputs, together) + " }"


def polling_text(loads: list[list[str]], checks: list[list[str]], words: int, together: bool = False) -> str:
    """Returns PTX that runs the loads and checks of some arrays until all are right, at first only those of the last
    array unless `together`. Loads write the registers w0, w1, .. of 64 bits, `words` in all; checks leave a bit in
    `all` where one is wrong, and may use the register `m`."""

    def until_all(name: str, some: range) -> list[str]:
        lines = [f"{name}:", *[line for ref in some for line in loads[ref]], "mov.b32 all, 0;"]
        lines += [line for ref in some for line in checks[ref]]
        return [*lines, "setp.ne.b32 wrong, all, 0;", f"@wrong bra {name};"] if some else []

    refs, first = len(loads), len(loads) if together else 1
    lines = [f".reg .b64 w<{words}>; .reg .b32 m, all; .reg .pred wrong;"]
    lines += [*until_all("last", range(refs - first, refs)), *until_all("others", range(refs - first))]
    return "\n".join(lines)


def address(pointer: Any, place: Any, more: int = 0) -> Any:
    """Returns the address of a word."""

    i64 = ir.IntegerType.get_signless(64)
    place = arith.addi(arith.index_cast(i64, place), arith.constant(i64, more))
    return mosaic.getelementptr(pointer, [place], i64)


def thread() -> Any:

    return arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x))


def _number(value: int) -> Any:

    return arith.constant(ir.IntegerType.get_signless(32), value)

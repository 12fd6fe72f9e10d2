"""Sums over slices of a map's inputs, published by twos: a word of 64 bits holds two of 24 bits, and a mark of 16.

When a step begins, all programs read the state and what each slice of `out` and `down` adds to it, 48 KB at width 768
and 72 KB at 1,024 in words of `odelm.models.kernels.marked`. With half a word a sum it is 27 and 40 KB. The lowest 8
bits of a float32 are left out: an error of at most 2^-15 of a sum, always towards 0, where the model rounds what enters
a branch to bfloat16, with 2^-9. The lower 16 bits of a mark are enough, since a place is written again every second
step; they are 0, as in a place that was never written, only after 65,535 steps.

An array of n sums is int32 (.., n / 2, 2). In a word, from the highest byte on, are the three of the first number, the
three of the second, and the two of the mark.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from odelm.models.kernels.marked import ROW, address, polling_text, strided, thread
from odelm.models.kernels.paired import half, i32_of, start_of
from odelm.models.kernels.signals import CONVERGENT, mosaic

plgpu: Any = mosaic_gpu
Ref = Any
NAMES = "out", "down"
"""The maps whose results are such sums."""
PACK = (
    "mov.b32 first, low; mov.b32 second, high; "
    "prmt.b32 upper, first, second, 0x3217; prmt.b32 lower, second, MARK, 0x2154;"
)
"""PTX that makes a word of two sums and a mark: see `paired.columns_text`."""


def put_sums(x: jax.Array, ref: Ref, mark: jax.Array) -> None:
    """Writes a product's result for one row, float32 (`ROWS`,), with a mark, int32 ().

    A thread has two rows, eight apart, and its neighbour four lanes away the next ones: they exchange one number each,
    as in `paired.put_columns_paired`.
    """

    def write(context: Any, x: Any, ref: Any, mark: Any) -> None:
        del context
        (row, *_), numbers = (places[0] for places in x.layout.thread_idxs(x.shape)), x.registers.flat
        both = [vector.extract(one, dynamic_position=[], static_position=[0]) for one in numbers]
        given = [start_of(ref), i32_of(row), *both, mark.registers.item(), thread()]
        mosaic.inline_ptx(row_text(), *given, has_side_effects=True, **CONVERGENT)

    splat = plgpu.Layout.WG_SPLAT
    plgpu.inline_mgpu(arg_types=(ROW, plgpu.RefType(), splat))(write)(x, ref, mark)


def row_text() -> str:
    """Returns the PTX that writes a word: $0 is the address of the vector, $1 a row of a product and $2 its number, $3
    that of the row eight below, $4 the mark and $5 the thread's number. Of four threads with the same numbers one
    writes; that of an odd row writes the lower rows."""
    return f"""{{ .reg .b32 odd, at, of, first, second, upper, lower; .reg .f32 sent, got, low, high;
.reg .b64 place, word; .reg .pred other, mine;
and.b32 odd, $1, 1; setp.ne.u32 other, odd, 0; and.b32 of, $5, 3; setp.eq.u32 mine, of, 0;
mad.lo.u32 at, odd, 7, $1; shr.u32 at, at, 1; mul.wide.u32 place, at, 8; add.u64 place, place, $0;
selp.f32 sent, $2, $3, other; shfl.sync.bfly.b32 got, sent, 4, 0x1f, 0xffffffff;
selp.f32 low, got, $2, other; selp.f32 high, $3, got, other;
{PACK.replace("MARK", "$4")} mov.b64 word, {{lower, upper}};
@mine st.relaxed.gpu.global.b64 [place], word; }}"""


def read_state(state: Ref, sums: Sequence[Ref], mark: jax.Array) -> list[jax.Array]:
    """Returns a state (n,), as `marked.read_marked` does, and sums (n,) of some slices, float32, as soon as all of them
    have the mark; the sums expected last should be the last."""
    n = state.shape[0]
    layout = strided(n)
    shape = plgpu.ShapeDtypeStruct((n,), jnp.float32, layout=layout)

    def read(context: Any, *arguments: Any) -> Any:
        del context
        *given, mark = arguments
        return _read(given, n, layout.to_mgpu(), mark.registers.item())

    types = (*[plgpu.RefType()] * (1 + len(sums)), plgpu.Layout.WG_SPLAT)
    found = plgpu.inline_mgpu(arg_types=types, return_type=(shape,) * (1 + len(sums)))(read)(state, *sums, mark)
    return list(found)


def _read(refs: Sequence[Any], n: int, layout: Any, mark: Any) -> Any:
    starts, shape = [places[0] for places in layout.thread_idxs((n,))], layout.registers_shape((n,))
    two = ir.VectorType.get((2,), ir.F32Type.get())
    assert layout.registers_element_type(ir.F32Type.get()) == two, "a thread holds two neighbouring numbers"
    bases = [address(mosaic.memref_ptr(ref), half(starts[0]) if r else starts[0]) for r, ref in enumerate(refs)]
    text, count = state_text(len(refs) - 1, len(starts)), 2 * len(refs) * len(starts)
    found = mosaic.inline_ptx(text, *bases, mark, result_types=[ir.F32Type.get()] * count, has_side_effects=True)
    arrays = []
    for first in range(0, count, 2 * len(starts)):
        registers = np.empty(shape, dtype=object)
        for i, place in enumerate(np.ndindex(shape)):
            registers[place] = vector.from_elements(two, list(found[first + 2 * i : first + 2 * i + 2]))
        arrays.append(FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
    return tuple(arrays)


def state_text(sums: int, registers: int) -> str:
    """Returns PTX that reads a state and `sums` vectors of sums until all have the mark: two numbers for each of so
    many registers of each, the outputs; then come the addresses, the state's first, and the mark."""
    outputs, loads, checks, unpacked = 2 * registers * (1 + sums), [[]], [[]], []
    mark = f"${outputs + 1 + sums}"
    for i in range(registers):
        loads[0].append(f"ld.relaxed.gpu.global.v2.b64 {{w{2 * i}, w{2 * i + 1}}}, [${outputs} + {2048 * i}];")
        for word in (2 * i, 2 * i + 1):
            checks[0].append(f"mov.b64 {{${word}, m}}, w{word}; xor.b32 m, m, {mark}; or.b32 all, all, m;")
    for vector_of in range(1, 1 + sums):
        load, check = [], []
        for i in range(registers):
            word = 2 * registers + (vector_of - 1) * registers + i
            load.append(f"ld.relaxed.gpu.global.b64 w{word}, [${outputs + vector_of} + {1024 * i}];")
            check.append(f"mov.b64 {{l{word}, u{word}}}, w{word}; xor.b32 m, l{word}, {mark};")
            check.append("and.b32 m, m, 0xffff; or.b32 all, all, m;")
            first = 2 * registers * vector_of + 2 * i
            unpacked.append(unpack_text(f"l{word}", f"u{word}", f"${first}", f"${first + 1}"))
        loads, checks = [*loads, load], [*checks, check]
    words = registers * (2 + sums)
    declared = f".reg .b32 l<{words}>, u<{words}>, bits;"
    return f"{{ {declared} {polling_text(loads, checks, words)} {' '.join(unpacked)} }}"


def unpack_text(lower: str, upper: str, first: str, second: str) -> str:
    """Returns the PTX that takes two numbers from the halves of a word; `bits` is a register that it may use."""
    return (
        f"and.b32 bits, {upper}, 0xffffff00; mov.b32 {first}, bits; "
        f"prmt.b32 bits, {upper}, {lower}, 0x0765; and.b32 bits, bits, 0xffffff00; mov.b32 {second}, bits;"
    )

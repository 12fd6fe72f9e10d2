"""Products of a matrix and one vector by the tensor-core instruction that each warp issues on its own (`mma.sync`).

A warpgroup's own instruction (`wgmma`) reads its right side from shared memory, in eight columns although all are
equal, and takes 25 cycles for 16 inputs. Here each warp loads its 16 rows of the matrix (`ldmatrix`), as fast as shared
memory delivers them: 8 KB, 64 rows by 64 inputs, in 64 cycles.

Here the eight columns of a right side are not equal: each is another part of the vector. A right side (16, 8) has two
parts of eight inputs in each column, one above the other, so that 128 inputs are one right side. A thread holds it in
two registers, where equal columns would take sixteen. Eight pieces of the matrix, of 16 inputs each, are multiplied by
it. Only the n-th column of the n-th product is wanted, the one of the piece's own inputs; so each product has sums of
its own, and at the end the eight columns are added.

The inputs of a piece need not be adjacent. They are the n-th part of a tile of 64 inputs, and the n-th part of the tile
beside it, so that both halves of a right side are in memory in the vector's order (PTX, "Matrix Fragments for
mma.m16n8k16").
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from odelm.models.kernels.layout import ROWS
from odelm.models.kernels.marked import ROW, thread
from odelm.models.kernels.signals import CONVERGENT, mosaic

plgpu: Any = mosaic_gpu
Ref = Any
TILE = 8, 64
"""Rows and inputs that lie together in shared memory, 128 bytes a row, whose eighths are in an order that depends on
the row: no two rows of an eighth are in the same banks."""
PLACED = plgpu.RefType(transforms=(plgpu.TilingTransform(TILE), plgpu.SwizzleTransform(128)))
PARTS = 8
"""Columns of a right side."""
MULTIPLY = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
INPUTS = 2 * TILE[1]
"""Inputs of one right side; a vector has a multiple of them."""


def put_pairs(x: jax.Array, ref: Ref, layout: Any) -> None:
    """Writes a vector, float32 (n,), each number held by one thread, as the right side of a product in bfloat16; `ref`
    is int32 (n / 2,) in shared memory, a pair each. It waits until no warp reads the previous right side any more."""

    def write(context: Any, x: Any, ref: Any) -> None:
        del context
        mosaic.warpgroup_barrier()
        base = shared_address(ref)
        for places, register in zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True):
            numbers = [_element(register, i) for i in range(register.type.shape[0])]
            place = arith.index_cast(_i32(), places[0])
            mosaic.inline_ptx(put_text(len(numbers)), base, place, *numbers, has_side_effects=True)

    plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))(write)(x, ref)


def put_text(numbers: int) -> str:
    """Returns the PTX that writes one or two neighbouring numbers of a right side, which has the vector's order: $0 is
    the address of the right side, $1 the index of the first number among the inputs, an even one where there are two,
    and the numbers follow."""
    at = ".reg .b32 at, pair; .reg .b16 one; shl.b32 at, $1, 1; add.u32 at, at, $0;"
    if numbers == 2:
        return f"{{ {at} cvt.rn.bf16x2.f32 pair, $3, $2; st.shared.b32 [at], pair; }}"
    return f"{{ {at} cvt.rn.bf16.f32 one, $2; st.shared.b16 [at], one; }}"


def product(matrices: Sequence[Ref], pairs: Ref, inputs: int) -> jax.Array:
    """Returns float32 (`ROWS`,), the product of bfloat16 matrices beside each other, (`ROWS`, n) each with `inputs`
    columns in all, and a right side that `put_pairs` has written."""
    widths = [matrix.shape[1] for matrix in matrices]
    assert sum(widths) == inputs and all(width % INPUTS == 0 for width in widths), (widths, inputs)

    def multiply(context: Any, pairs: Any, *matrices: Any) -> Any:
        del context
        mosaic.warpgroup_barrier()
        given = [shared_address(matrix) for matrix in matrices]
        results = dict(result_types=[ir.F32Type.get()] * 2, has_side_effects=True, **CONVERGENT)
        return _rows(mosaic.inline_ptx(product_text(widths), shared_address(pairs), thread(), *given, **results))

    types = (plgpu.RefType(), *[PLACED] * len(matrices))
    shape = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW)
    return plgpu.inline_mgpu(arg_types=types, return_type=shape)(multiply)(pairs, *matrices)


def product_text(widths: Sequence[int]) -> str:
    """Returns the PTX of a product with matrices of `widths` inputs each, multiples of `INPUTS`: $0 and $1 are the sums
    of a thread's two rows, of which the second is the eighth after the first; $2 is the address of the right side, $3
    the thread's number, and the addresses of the matrices follow."""
    pairs = sum(widths) // INPUTS
    lines = [
        f".reg .b32 row, matrix, half, warp, turn, base, right, place<{PARTS}>;",
        f".reg .b32 a<{4 * PARTS * pairs}>, b<{2 * pairs}>; .reg .f32 c<{4 * PARTS}>, s<8>; .reg .pred odd, high;",
        "and.b32 row, $3, 7; shr.u32 matrix, $3, 3; and.b32 matrix, matrix, 1;",
        "shr.u32 half, $3, 4; and.b32 half, half, 1; shr.u32 warp, $3, 5; and.b32 warp, warp, 3;",
        "shl.b32 warp, warp, 1; add.u32 matrix, matrix, warp; shl.b32 half, half, 10;",
        "and.b32 right, $3, 15; shl.b32 right, right, 4; add.u32 right, right, $2;",
    ]
    lines += [f"mov.f32 c{i}, 0f00000000;" for i in range(4 * PARTS)]
    for pair in range(pairs):
        lines.append(
            f"ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{b{2 * pair}, b{2 * pair + 1}}}, [right + {256 * pair}];"
        )
    step = 0
    for number, width in enumerate(widths):
        lines.append(f"mad.lo.u32 base, matrix, {1024 * (width // TILE[1])}, ${4 + number}; add.u32 base, base, half;")
        lines.append("shl.b32 turn, row, 7; add.u32 base, base, turn;")
        for n in range(PARTS):
            lines.append(f"xor.b32 turn, row, {n}; shl.b32 turn, turn, 4; add.u32 place{n}, base, turn;")
        for pair in range(width // INPUTS):
            for n in range(PARTS):
                a = ", ".join(f"a{4 * step + i}" for i in range(4))
                c = ", ".join(f"c{4 * n + i}" for i in range(4))
                b = step // PARTS * 2
                lines.append(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{a}}}, [place{n} + {2048 * pair}];")
                lines.append(f"{MULTIPLY} {{{c}}}, {{{a}}}, {{b{b}, b{b + 1}}}, {{{c}}};")
                step += 1
    return "{ " + "\n".join([*lines, *_added()]) + " }"


def _added() -> list[str]:
    """Returns the PTX that adds the columns: a thread has the columns 2 q and 2 q + 1 of two rows, where q is its
    number modulo 4, and takes them from the sums of those parts; then the four threads of a row add theirs."""
    lines = ["and.b32 turn, $3, 1; setp.ne.u32 odd, turn, 0; and.b32 turn, $3, 2; setp.ne.u32 high, turn, 0;"]
    for row in (0, 1):
        lines += [f"add.f32 s{q}, c{8 * q + 2 * row}, c{8 * q + 4 + 2 * row + 1};" for q in range(4)]
        lines += ["selp.f32 s4, s1, s0, odd; selp.f32 s5, s3, s2, odd; selp.f32 s6, s5, s4, high;"]
        for other in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 s7, s6, {other}, 0x1f, 0xffffffff; add.f32 s6, s6, s7;")
        lines.append(f"mov.f32 ${row}, s6;")
    return lines


def _rows(found: Sequence[Any]) -> Any:
    """Returns the sums of a product; each thread has those of two rows."""
    layout = ROW.to_mgpu()
    registers = np.empty(layout.registers_shape((ROWS,)), dtype=object)
    assert registers.size == len(found), registers.shape
    for place, value in zip(np.ndindex(registers.shape), found, strict=True):
        registers[place] = vector.from_elements(ir.VectorType.get((1,), ir.F32Type.get()), [value])
    return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def shared_address(ref: Any) -> Any:
    """Returns the address of an array in shared memory."""
    return llvm.ptrtoint(_i32(), mosaic.memref_ptr(ref))


def _element(register: Any, i: int) -> Any:
    return vector.extract(register, dynamic_position=[], static_position=[i])


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)

"""Products of a matrix and one vector by the instruction that each warp gives its tensor core by itself (`mma.sync`).

A warpgroup's own instruction (`wgmma`) takes its right side from shared memory, eight columns of it though all are
equal, and 25 cycles for 16 inputs. Here each warp loads its 16 rows of the matrix (`ldmatrix`), as fast as shared
memory gives them: 8 KB, 64 rows by 64 inputs, in 64 cycles. The right side is kept once, in the order in which threads
need it.

Of the right side a thread has the inputs 8 c + 2 q and 8 c + 2 q + 1 for all c, where q is its number modulo 4; these
pairs, of 16 bits each, lie one behind the other for each q (PTX, "Matrix Fragments for mma.m16n8k16").
"""

from collections.abc import Callable, Sequence
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
Text = Callable[..., str]
TILE = 8, 64
"""Rows and inputs that lie together in shared memory, 128 bytes a row, whose eighths are in an order that depends on
the row: no two rows of an eighth are in the same banks."""
PLACED = plgpu.RefType(transforms=(plgpu.TilingTransform(TILE), plgpu.SwizzleTransform(128)))
SUMS = 4
"""Independent sums, since a tensor core takes longer for a product than until the next may begin."""
MULTIPLY = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
SPARE = 4
"""Pairs left free behind those of each q, so that the four are in different banks."""


def pairs_of(inputs: int) -> int:
    """Returns how many pairs of 16 bits a right side takes."""
    return 4 * _stride(inputs)


def _stride(inputs: int) -> int:
    return inputs // 8 + SPARE


def put_pairs(x: jax.Array, ref: Ref, layout: Any, *, text: Text | None = None) -> None:
    """Writes a vector, float32 (n,), each number of which one thread has, as the right side of a product in bfloat16;
    `ref` is int32 (`pairs_of(n)`,) in shared memory. It begins when no warp reads the one before any more. `text` is
    the `put_text` of another order."""
    text = text or put_text

    def write(context: Any, x: Any, ref: Any) -> None:
        del context
        mosaic.warpgroup_barrier()
        base = _address(ref)
        for places, register in zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True):
            numbers = [_element(register, i) for i in range(register.type.shape[0])]
            place = arith.index_cast(_i32(), places[0])
            mosaic.inline_ptx(text(x.shape[0], len(numbers)), base, place, *numbers, has_side_effects=True)

    plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))(write)(x, ref)


def put_text(inputs: int, numbers: int) -> str:
    """Returns the PTX that writes one or two neighbouring numbers of a right side: $0 is where that is, $1 which of the
    inputs the first is, an even one where there are two, and the numbers follow."""
    lines = [
        ".reg .b32 at, q, pair; .reg .b16 one; shr.u32 at, $1, 3; and.b32 q, $1, 7; shr.u32 q, q, 1;",
        f"mad.lo.u32 at, q, {_stride(inputs)}, at; shl.b32 at, at, 2; add.u32 at, at, $0;",
    ]
    if numbers == 2:
        lines.append("cvt.rn.bf16x2.f32 pair, $3, $2; st.shared.b32 [at], pair;")
    else:
        lines.append("and.b32 q, $1, 1; shl.b32 q, q, 1; add.u32 at, at, q;")
        lines.append("cvt.rn.bf16.f32 one, $2; st.shared.b16 [at], one;")
    return "{ " + "\n".join(lines) + " }"


def product(matrices: Sequence[Ref], pairs: Ref, inputs: int, *, text: Text | None = None) -> jax.Array:
    """Returns float32 (`ROWS`,), the product of bfloat16 matrices beside each other, (`ROWS`, n) each with `inputs`
    columns in all, and a right side that `put_pairs` has written. `text` is the `product_text` of another order."""
    text = text or product_text
    widths = [matrix.shape[1] for matrix in matrices]
    assert sum(widths) == inputs and all(width % TILE[1] == 0 for width in widths), (widths, inputs)

    def multiply(context: Any, pairs: Any, *matrices: Any) -> Any:
        del context
        mosaic.warpgroup_barrier()
        given = [_address(matrix) for matrix in matrices]
        results = dict(result_types=[ir.F32Type.get()] * 2, has_side_effects=True, **CONVERGENT)
        return _rows(mosaic.inline_ptx(text(widths), _address(pairs), thread(), *given, **results))

    types = (plgpu.RefType(), *[PLACED] * len(matrices))
    shape = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW)
    return plgpu.inline_mgpu(arg_types=types, return_type=shape)(multiply)(pairs, *matrices)


def product_text(widths: Sequence[int]) -> str:
    """Returns the PTX of a product with matrices of so many inputs each: $0 and $1 are the sums of a thread's two rows,
    of which the second is the eighth behind the first; $2 is where the right side is, $3 the thread's number, and then
    follows where the matrices are."""
    inputs = sum(widths)
    eighths = inputs // 8
    lines = [
        ".reg .b32 row, matrix, half, warp, turn, base, right, place<4>;",
        f".reg .b32 a<{2 * eighths}>, b<{eighths}>; .reg .f32 c<{4 * SUMS}>;",
        "and.b32 row, $3, 7; shr.u32 matrix, $3, 3; and.b32 matrix, matrix, 1;",
        "shr.u32 half, $3, 4; and.b32 half, half, 1; shr.u32 warp, $3, 5; and.b32 warp, warp, 3;",
        "shl.b32 warp, warp, 1; add.u32 matrix, matrix, warp;",
        f"and.b32 right, $3, 3; mad.lo.u32 right, right, {4 * _stride(inputs)}, $2;",
    ]
    lines += [f"mov.f32 c{i}, 0f00000000;" for i in range(4 * SUMS)]
    for i in range(0, eighths, 4):
        lines.append(f"ld.shared.v4.b32 {{b{i}, b{i + 1}, b{i + 2}, b{i + 3}}}, [right + {4 * i}];")
    step = 0
    for number, width in enumerate(widths):
        lines.append(f"mad.lo.u32 base, matrix, {1024 * (width // TILE[1])}, ${4 + number};")
        lines.append("shl.b32 turn, row, 7; add.u32 base, base, turn;")
        for s in range(4):
            lines.append(f"add.u32 turn, half, {2 * s}; xor.b32 turn, turn, row; shl.b32 turn, turn, 4;")
            lines.append(f"add.u32 place{s}, base, turn;")
        for tile in range(width // TILE[1]):
            for s in range(4):
                a = ", ".join(f"a{4 * step + i}" for i in range(4))
                c = ", ".join(f"c{step % SUMS * 4 + i}" for i in range(4))
                lines.append(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{a}}}, [place{s} + {1024 * tile}];")
                lines.append(f"{MULTIPLY} {{{c}}}, {{{a}}}, {{b{2 * step}, b{2 * step + 1}}}, {{{c}}};")
                step += 1
    for i in (0, 2):
        lines += [f"add.f32 c{i}, c{i}, c{i + 4}; add.f32 c{i + 8}, c{i + 8}, c{i + 12}; add.f32 c{i}, c{i}, c{i + 8};"]
    lines += ["mov.f32 $0, c0; mov.f32 $1, c2;"]
    return "{ " + "\n".join(lines) + " }"


def _rows(found: Sequence[Any]) -> Any:
    """Returns the sums of a product, of which each thread has those of two rows."""
    layout = ROW.to_mgpu()
    registers = np.empty(layout.registers_shape((ROWS,)), dtype=object)
    assert registers.size == len(found), registers.shape
    for place, value in zip(np.ndindex(registers.shape), found, strict=True):
        registers[place] = vector.from_elements(ir.VectorType.get((1,), ir.F32Type.get()), [value])
    return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _address(ref: Any) -> Any:
    """Returns where something is in shared memory."""
    return llvm.ptrtoint(_i32(), mosaic.memref_ptr(ref))


def _element(register: Any, i: int) -> Any:
    return vector.extract(register, dynamic_position=[], static_position=[i])


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)

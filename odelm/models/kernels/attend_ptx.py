"""The PTX of `odelm.models.kernels.attend_by_warps`.

q is a thread's number modulo 4: of an 8 x 8 matrix a thread has the numbers 2 q and 2 q + 1 of a row (PTX, "Matrix
Fragments for mma.m16n8k16"). In shared memory, keys and values are 128 bytes a place, whose eighths are in the order of
their number ^ place (`by_warps.TILE`). Results are moved to their operands at the end: the compiler may give a result
the register of an operand that is read for the last time.
"""

import numpy as np

from odelm.models.kernels.by_warps import MULTIPLY


def halves_text() -> str:
    """Returns the PTX that splits a query: $16 to $31 are the numbers 2 q and 2 q + 1 of each eight, where q is a
    thread's number modulo 4; $0 to $15 become, for each of these pairs, the rounded ones and what is left."""
    lines = [".reg .b32 e0, e1, h<16>; .reg .f32 f0, f1;"]
    for j in range(8):
        lines += _split(f"${16 + 2 * j}", f"${17 + 2 * j}", f"h{2 * j}", f"h{2 * j + 1}")
    lines += [f"mov.b32 ${i}, h{i};" for i in range(16)]
    return "{ " + "\n".join(lines) + " }"


def _split(x: str, y: str, high: str, low: str) -> list[str]:
    """Returns the PTX that makes of two numbers a word of bfloat16, and one of what is left of them."""
    return [
        f"cvt.rn.bf16x2.f32 {high}, {y}, {x}; shl.b32 e0, {high}, 16; and.b32 e1, {high}, 4294901760;",
        f"sub.f32 f0, {x}, e0; sub.f32 f1, {y}, e1; cvt.rn.bf16x2.f32 {low}, f1, f0;",
    ]


_WARP = """.reg .b32 row, warp, matrix, base, turn;
and.b32 row, {thread}, 7; shr.u32 warp, {thread}, 5; and.b32 warp, warp, 3;"""
"""PTX for a thread's row of an 8 x 8 matrix in shared memory, and the number of its warp."""


def scores_text(least: float) -> str:
    """Returns the PTX that computes four scores of each thread, $0 to $3: of the places 2 q, 2 q + 1, 2 q + 8 and 2 q +
    9 of its warp's 16, where q is its number modulo 4. $4 and $5 are the addresses of a chunk's keys and of what is
    added to its scores, $6 is the thread's number, $7 the chunk's first place and $8 the first that is not attended to,
    and the left side follows."""
    lines = [
        ".reg .b32 b<16>, place, at; .reg .f32 c<16>, s<4>, h<4>; .reg .pred seen;",
        _WARP.format(thread="$6"),
        "shr.u32 matrix, $6, 3; and.b32 matrix, matrix, 3; shl.b32 base, warp, 11; shl.b32 turn, row, 7;",
        "add.u32 base, base, turn; add.u32 base, base, $4;",
    ]
    for half in (0, 1):  # of the 64 inputs; a row's parts of 16 bytes are in the order of part ^ row
        lines.append(f"add.u32 turn, matrix, {4 * half}; xor.b32 turn, turn, row; shl.b32 turn, turn, 4;")
        lines.append("add.u32 turn, turn, base;")
        for eight in (0, 1):  # of the 16 places
            b = ", ".join(f"b{8 * half + 4 * eight + i}" for i in range(4))
            lines.append(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{b}}}, [turn + {1024 * eight}];")
    lines += ["and.b32 place, $6, 3; shl.b32 place, place, 1; shl.b32 at, warp, 4; add.u32 place, place, at;"]
    lines += ["shl.b32 at, place, 2; add.u32 at, at, $5; add.u32 place, place, $7;"]
    lines += [f"ld.shared.v2.f32 {{h{2 * eight}, h{2 * eight + 1}}}, [at + {32 * eight}];" for eight in (0, 1)]
    lines += [f"mov.f32 c{i}, 0f00000000;" for i in range(16)]
    for step in (0, 1):  # four sums, so that no product waits for the one before it
        for half in (0, 1):
            for eight in (0, 1):
                c = ", ".join(f"c{8 * half + 4 * eight + i}" for i in range(4))
                first = 8 * half + 4 * eight + 2 * step
                a = ", ".join(f"${9 + 4 * (2 * half + step) + i}" for i in range(4))
                lines.append(f"{MULTIPLY} {{{c}}}, {{{a}}}, {{b{first}, b{first + 1}}}, {{{c}}};")
    for i in range(4):
        parts = [4 * (i // 2) + i % 2 + more for more in (0, 2, 8, 10)]
        lines.append(f"add.f32 s{i}, c{parts[0]}, c{parts[1]}; add.f32 h{i}, h{i}, c{parts[2]};")
        lines.append(f"add.f32 h{i}, h{i}, c{parts[3]}; add.f32 s{i}, s{i}, h{i};")
        lines.append(f"add.u32 at, place, {8 * (i // 2) + i % 2}; setp.lt.s32 seen, at, $8;")
        lines.append(f"selp.f32 s{i}, s{i}, {_bits(least)}, seen;")
    lines += [f"mov.f32 ${i}, s{i};" for i in range(4)]
    return "{ " + "\n".join(lines) + " }"


LOG2E = "0f3FB8AA3B"


def values_text() -> str:
    """Returns the PTX that adds a chunk's values to a running average. $18 is the address of the values, $19 the
    thread's number, $20 to $23 are its scores, $24 the largest score so far, $25 the sum of weights, and $26 to $41 are
    the sums of values; $0, $1 and $2 to $17 become these three after the chunk."""
    lines = [
        ".reg .b32 a<16>, b<2>, high<2>, low<2>, e0, e1, half; .reg .f32 top, got, kept, total, w<4>, f0, f1, c<16>;",
        ".reg .pred odd;",
        _WARP.format(thread="$19"),
        "shr.u32 half, $19, 3; and.b32 half, half, 1; shr.u32 matrix, $19, 4; and.b32 matrix, matrix, 1;",
        "shl.b32 base, warp, 11; shl.b32 turn, matrix, 10; add.u32 base, base, turn; shl.b32 turn, row, 7;",
        "add.u32 base, base, turn; add.u32 base, base, $18;",
    ]
    for i in range(4):  # of the 64 values: 16 rows of the turned matrix
        a = ", ".join(f"a{4 * i + n}" for n in range(4))
        lines.append(f"add.u32 turn, half, {2 * i}; xor.b32 turn, turn, row; shl.b32 turn, turn, 4;")
        lines.append("add.u32 turn, turn, base;")
        lines.append(f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{a}}}, [turn];")
    lines += ["max.f32 top, $20, $21; max.f32 got, $22, $23; max.f32 top, top, got;"]
    for other in (1, 2):
        lines.append(f"shfl.sync.bfly.b32 got, top, {other}, 0x1f, 0xffffffff; max.f32 top, top, got;")
    lines += [f"max.f32 top, top, $24; sub.f32 kept, $24, top; mul.f32 kept, kept, {LOG2E}; ex2.approx.f32 kept, kept;"]
    lines += ["mul.f32 total, $25, kept;"]
    for i in range(4):
        lines.append(f"sub.f32 w{i}, ${20 + i}, top; mul.f32 w{i}, w{i}, {LOG2E}; ex2.approx.f32 w{i}, w{i};")
        lines.append(f"add.f32 total, total, w{i};")
    lines += ["and.b32 half, $19, 4; setp.ne.u32 odd, half, 0;"]
    for eight in (0, 1):
        lines += _split(f"w{2 * eight}", f"w{2 * eight + 1}", f"high{eight}", f"low{eight}")
        lines.append(f"selp.b32 b{eight}, low{eight}, high{eight}, odd;")
    lines += [f"mul.f32 c{i}, ${26 + i}, kept;" for i in range(16)]
    for i in range(4):
        a, c = (", ".join(f"{name}{4 * i + n}" for n in range(4)) for name in "ac")
        lines.append(f"{MULTIPLY} {{{c}}}, {{{a}}}, {{b0, b1}}, {{{c}}};")
    lines += ["mov.f32 $0, top; mov.f32 $1, total;", *[f"mov.f32 ${2 + i}, c{i};" for i in range(16)]]
    return "{ " + "\n".join(lines) + " }"


def leave_text() -> str:
    """Returns the PTX by which each warp writes what it has to shared memory at $0: $1 is a thread's number, $2 its
    warp's largest score, $3 its sum of weights, and $4 to $19 are its sums of values."""
    lines = [
        ".reg .b32 lane, warp, at, one; .reg .f32 total, got, x; .reg .pred mine, first;",
        "and.b32 lane, $1, 31; shr.u32 warp, $1, 5; and.b32 warp, warp, 3; and.b32 at, lane, 3;",
        "setp.eq.u32 mine, at, 0; setp.eq.u32 first, lane, 0; mov.f32 total, $3;",
    ]
    for other in (1, 2):
        lines.append(f"shfl.sync.bfly.b32 got, total, {other}, 0x1f, 0xffffffff; add.f32 total, total, got;")
    lines += ["shl.b32 one, warp, 2; add.u32 one, one, $0;"]
    lines += ["@first st.shared.f32 [one + 1024], $2; @first st.shared.f32 [one + 1040], total;"]
    lines += ["shl.b32 at, warp, 8; add.u32 at, at, $0; and.b32 one, lane, 28; add.u32 at, at, one;"]
    for i in range(8):
        lines.append(f"add.f32 x, ${4 + 2 * i}, ${5 + 2 * i}; @mine st.shared.f32 [at + {32 * i}], x;")
    return "{ " + "\n".join(lines) + " }"


def collect_text() -> str:
    """Returns the PTX that adds up what the warps have left in shared memory at $18: $0 becomes the largest score, $1
    the sum of weights, and $2 to $17 the numbers 2 q and 2 q + 1 of each eight values, where q is the number of the
    thread, $19, modulo 4."""
    lines = [
        ".reg .b32 at; .reg .f32 t<4>, n<4>, x, y, got, top, total, c<16>;",
        "ld.shared.v4.f32 {t0, t1, t2, t3}, [$18 + 1024]; ld.shared.v4.f32 {n0, n1, n2, n3}, [$18 + 1040];",
        "max.f32 top, t0, t1; max.f32 got, t2, t3; max.f32 top, top, got; mov.f32 total, 0f00000000;",
        "and.b32 at, $19, 3; shl.b32 at, at, 3; add.u32 at, at, $18;",
        *[f"mov.f32 c{i}, 0f00000000;" for i in range(16)],
    ]
    for w in range(4):
        lines.append(f"sub.f32 t{w}, t{w}, top; mul.f32 t{w}, t{w}, {LOG2E}; ex2.approx.f32 t{w}, t{w};")
        lines.append(f"fma.rn.f32 total, n{w}, t{w}, total;")
        for j in range(8):
            lines.append(f"ld.shared.v2.f32 {{x, y}}, [at + {256 * w + 32 * j}];")
            lines.append(f"fma.rn.f32 c{2 * j}, x, t{w}, c{2 * j}; fma.rn.f32 c{2 * j + 1}, y, t{w}, c{2 * j + 1};")
    lines += ["mov.f32 $0, top; mov.f32 $1, total;", *[f"mov.f32 ${2 + i}, c{i};" for i in range(16)]]
    return "{ " + "\n".join(lines) + " }"


def _bits(number: float) -> str:
    """Returns a number of float32 as PTX writes it."""
    return f"0f{np.float32(number).view(np.uint32):08X}"

"""Products by the warps themselves: the PTX, by a small interpreter of it. Only a card shows what it makes of it."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from odelm.models.kernels.by_warps import MULTIPLY, product_text, put_text
from odelm.models.kernels.layout import ROWS, THREADS

LANES = np.arange(32)
ROW, QUARTER = LANES // 4, LANES % 4


class Warps:
    """The threads of a warpgroup and their shared memory, as PTX describes both ("Matrix Fragments")."""

    def __init__(self, memory: np.ndarray, operands: list[object]):
        self.memory = memory
        self.registers = {f"${i}": np.broadcast_to(x, (THREADS,)).copy() for i, x in enumerate(operands)}

    def run(self, text: str) -> None:
        for statement in text.strip("{} \n").split(";"):
            operation, _, rest = statement.strip().partition(" ")
            if operation and not operation.startswith(".reg"):
                self.do(operation, re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest))

    def do(self, operation: str, given: list[str]) -> None:
        kind = operation.split(".")[0]
        if kind in ("ld", "ldmatrix"):
            load = self.rows if kind == "ldmatrix" else self.words
            found = load(self.address(given[1]))
            self.registers |= zip(names(given[0]), found[:2] if ".x2." in operation else found, strict=True)
        elif kind == "st":
            of = self.registers[given[1]]
            for at, value in zip(self.address(given[0]), of, strict=True):
                self.memory[at : at + of.itemsize] = np.frombuffer(value.tobytes(), np.uint8)
        elif kind == "shfl":
            assert operation == "shfl.sync.bfly.b32" and given[3:] == ["0x1f", "0xffffffff"]
            self.registers[given[0]] = self.registers[given[1]][np.arange(THREADS) ^ int(given[2])]
        elif operation == MULTIPLY:
            self.multiply(*map(names, given))
        else:
            x = [self.value(one) for one in given[1:]]
            self.registers[given[0]] = np.broadcast_to(COMPUTED[operation](*x), (THREADS,))

    def value(self, name: str) -> object:
        if name.startswith("0f"):
            return np.uint32(int(name[2:], 16)).view(np.float32)
        return np.uint32(int(name)) if name.isdigit() else self.registers[name]

    def address(self, text: str) -> np.ndarray:
        register, *more = text.strip("[]").split(" + ")
        return self.registers[register].astype(np.int64) + sum(map(int, more))

    def words(self, address: np.ndarray) -> list[np.ndarray]:
        assert (address % 16 == 0).all()
        found = [self.memory[at : at + 16].view(np.uint32) for at in address]
        return list(np.stack(found, axis=1))

    def rows(self, address: np.ndarray) -> list[np.ndarray]:
        """8 x 8 matrices, four for each warp: the lanes of each eighth say where the rows of one are."""
        found = np.empty((4, THREADS), np.uint32)
        for warp, number in np.ndindex(4, 4):
            first = 32 * warp + 8 * number
            matrix = np.stack([self.memory[at : at + 16].view(np.uint32) for at in address[first : first + 8]])
            found[number, 32 * warp : 32 * warp + 32] = matrix[ROW, QUARTER]
        return list(found)

    def multiply(self, sums: list[str], left: list[str], right: list[str], before: list[str]) -> None:
        assert sums == before
        for warp in range(4):
            here = slice(32 * warp, 32 * warp + 32)
            a, b, c = np.empty((16, 16)), np.empty((16, 8)), np.empty((16, 8))
            for number, name in enumerate(left):
                for i, x in enumerate(halves(self.registers[name][here])):
                    a[ROW + number % 2 * 8, 2 * QUARTER + number // 2 * 8 + i] = x
            for number, name in enumerate(right):
                for i, x in enumerate(halves(self.registers[name][here])):
                    b[2 * QUARTER + 8 * number + i, ROW] = x
            places = [(ROW + number // 2 * 8, 2 * QUARTER + number % 2) for number in range(4)]
            for name, place in zip(sums, places, strict=True):
                c[place] = self.registers[name][here]
            c = c + a @ b
            for name, place in zip(sums, places, strict=True):
                self.registers[name] = self.registers[name].copy()
                self.registers[name][here] = c[place]


def pair(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return one(high).astype(np.uint32) << 16 | one(low)


def one(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).view(np.uint16)


COMPUTED = {
    "mov.f32": lambda x: x,
    "add.f32": lambda x, y: x + y,
    "add.u32": lambda x, y: x + y,
    "and.b32": lambda x, y: x & y,
    "xor.b32": lambda x, y: x ^ y,
    "shl.b32": lambda x, y: x << y,
    "shr.u32": lambda x, y: x >> y,
    "setp.ne.u32": lambda x, y: x != y,
    "selp.f32": lambda x, y, chosen: np.where(chosen, x, y),
    "mad.lo.u32": lambda x, y, z: x * y + z,
    "cvt.rn.bf16x2.f32": pair,
    "cvt.rn.bf16.f32": one,
}


def names(text: str) -> list[str]:
    return text.strip("{}").split(", ")


def halves(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (words << 16).view(np.float32), (words & 0xFFFF0000).view(np.float32)


def placed(matrix: np.ndarray) -> np.ndarray:
    """Returns the bytes of a matrix (64, n) of bfloat16 where a copy puts them: tiles of 8 rows by 64 inputs, each row
    of which is 8 parts of 16 bytes, in the order of part ^ row."""
    parts = matrix.view(np.uint8).reshape(8, 8, -1, 8, 16).transpose(0, 2, 1, 3, 4)
    found = np.empty_like(parts)
    for row, part in np.ndindex(8, 8):
        found[:, :, row, part ^ row] = parts[:, :, row, part]
    return found.reshape(-1)


@pytest.mark.parametrize("widths", [(768,), (1024,), (128, 128), (384,)])
@pytest.mark.parametrize("numbers", [1, 2])
def test_a_program_multiplies_its_rows(widths, numbers):
    inputs, rng = sum(widths), np.random.default_rng(0)
    x = rng.normal(size=inputs).astype(np.float32)
    matrix = np.asarray(jnp.asarray(rng.normal(size=(ROWS, inputs)), jnp.bfloat16))
    cuts = np.split(matrix, np.cumsum(widths)[:-1], axis=1)
    memory, starts = np.concatenate([placed(np.ascontiguousarray(cut)) for cut in cuts]), [0]
    starts += np.cumsum([2 * ROWS * width for width in widths]).tolist()
    memory = np.concatenate([memory, np.full(2 * inputs, 255, np.uint8)])
    threads = np.arange(THREADS, dtype=np.uint32)

    for first in range(0, inputs, numbers * THREADS):
        places = first + numbers * threads
        kept = places < inputs
        shown = np.where(kept, places, places[0])
        Warps(memory, [np.uint32(starts[-1]), shown, *[x[shown + i] for i in range(numbers)]]).run(put_text(numbers))
    given = [np.uint32(starts[-1]), threads, *map(np.uint32, starts[:-1])]
    warps = Warps(memory, [np.float32(0), np.float32(0), *given])
    warps.run(product_text(widths))

    expected = matrix.astype(np.float64) @ np.asarray(jnp.asarray(x, jnp.bfloat16)).astype(np.float64)
    rows = 16 * (threads // 32) + threads % 32 // 4
    np.testing.assert_allclose(warps.registers["$0"], expected[rows], atol=1e-4)
    np.testing.assert_allclose(warps.registers["$1"], expected[rows + 8], atol=1e-4)

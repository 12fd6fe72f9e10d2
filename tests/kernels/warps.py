"""A small interpreter of PTX: the threads of a warpgroup, their registers, and memory that they write and read."""

import re

import jax.numpy as jnp
import numpy as np

from odelm.models.kernels.by_warps import MULTIPLY
from odelm.models.kernels.layout import THREADS

LANES = np.arange(32)
ROW, QUARTER = LANES // 4, LANES % 4


class Warps:
    """The threads of a warpgroup and the memory that they use, as PTX describes both ("Matrix Fragments")."""

    def __init__(self, memory: np.ndarray, operands: list[object]):
        self.memory = memory
        self.registers = {f"${i}": np.broadcast_to(x, (THREADS,)).copy() for i, x in enumerate(operands)}

    def run(self, text: str) -> None:
        for statement in text.strip("{} \n").split(";"):
            operation, _, rest = statement.strip().partition(" ")
            chosen = np.ones(THREADS, bool)
            if operation.startswith("@"):
                chosen = self.registers[operation[1:]]
                operation, _, rest = rest.partition(" ")
            if operation and not operation.startswith(".reg"):
                self.do(operation, re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest), chosen)

    def do(self, operation: str, given: list[str], chosen: np.ndarray) -> None:
        kind = operation.split(".")[0]
        if kind == "ldmatrix":
            found = self.rows(self.address(given[1]), turned=".trans." in operation)
            self.registers |= zip(names(given[0]), found[:2] if ".x2." in operation else found, strict=True)
        elif kind == "ld":
            words = self.words(self.address(given[1]), len(names(given[0])))
            self.registers |= zip(names(given[0]), words, strict=True)
        elif kind == "st":
            of = self.registers[given[1]]
            for at, value in zip(self.address(given[0])[chosen], of[chosen], strict=True):
                self.memory[at : at + of.itemsize] = np.frombuffer(value.tobytes(), np.uint8)
        elif kind == "shfl":
            assert operation == "shfl.sync.bfly.b32" and given[3:] == ["0x1f", "0xffffffff"]
            self.registers[given[0]] = self.registers[given[1]][np.arange(THREADS) ^ int(given[2])]
        elif operation == MULTIPLY:
            self.multiply(*map(names, given))
        else:
            assert chosen.all(), "only stores are conditional"
            x = [self.value(one) for one in ([*names(given[1])] if given[1].startswith("{") else given[1:])]
            self.registers[given[0]] = np.broadcast_to(COMPUTED[operation](*x), (THREADS,))

    def value(self, name: str) -> object:
        if name.startswith("0f"):
            return np.uint32(int(name[2:], 16)).view(np.float32)
        if name.startswith("0x"):
            return np.uint32(int(name, 16))
        return np.uint32(int(name)) if name.isdigit() else self.registers[name]

    def address(self, text: str) -> np.ndarray:
        register, *more = text.strip("[]").split(" + ")
        return self.registers[register].astype(np.int64) + sum(map(int, more))

    def words(self, address: np.ndarray, count: int) -> list[np.ndarray]:
        assert (address % (4 * count) == 0).all()
        found = [self.memory[at : at + 4 * count].view(np.uint32) for at in address]
        return list(np.stack(found, axis=1))

    def rows(self, address: np.ndarray, *, turned: bool) -> list[np.ndarray]:
        """8 x 8 matrices, four for each warp: the lanes of each eighth say where the rows of one are."""
        found = np.empty((4, THREADS), np.uint32)
        for warp, number in np.ndindex(4, 4):
            first = 32 * warp + 8 * number
            matrix = np.stack([self.memory[at : at + 16].view(np.uint16) for at in address[first : first + 8]])
            matrix = np.ascontiguousarray(matrix.T if turned else matrix).view(np.uint32)
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
    "add.u32": lambda x, y: x + y,
    "and.b32": lambda x, y: x & y,
    "xor.b32": lambda x, y: x ^ y,
    "shl.b32": lambda x, y: x << y,
    "shr.u32": lambda x, y: x >> y,
    "setp.ne.u32": lambda x, y: x != y,
    "selp.f32": lambda x, y, chosen: np.where(chosen, x, y),
    "mul.wide.u32": lambda x, y: x.astype(np.uint64) * np.uint64(y),
    "add.u64": lambda x, y: x + y,
    "setp.lt.u32": lambda x, y: x < y,
    "mov.b64": lambda low, high: low.astype(np.uint64) | high.astype(np.uint64) << 32,
    "mad.lo.u32": lambda x, y, z: x * y + z,
    "cvt.rn.bf16x2.f32": pair,
    "cvt.rn.bf16.f32": one,
    "or.b32": lambda x, y: x | y,
}


def real(x: object) -> np.ndarray:
    """Returns the numbers of float32 whose bits a register has."""
    x = np.asarray(x)
    return x.view(np.float32) if x.dtype == np.uint32 else x


COMPUTED |= {
    "mov.f32": real,
    "mov.b32": lambda x: x,
    "add.f32": lambda x, y: real(x) + real(y),
    "sub.f32": lambda x, y: real(x) - real(y),
    "mul.f32": lambda x, y: real(x) * real(y),
    "max.f32": lambda x, y: np.maximum(real(x), real(y)),
    "fma.rn.f32": lambda x, y, z: real(x) * real(y) + real(z),
    "ex2.approx.f32": lambda x: np.exp2(real(x)),
    "setp.eq.u32": lambda x, y: x == y,
    "setp.lt.s32": lambda x, y: x.astype(np.int32) < y.astype(np.int32),
    "selp.b32": lambda x, y, chosen: np.where(chosen, x, y),
}


def permuted(x: object, y: object, selector: np.uint32) -> np.ndarray:
    """`prmt`: each byte of the result is one of the eight of two words, those of the first before."""
    words = np.stack(np.broadcast_arrays(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32)), axis=-1)
    of = [int(selector) >> 4 * i & 0xF for i in range(4)]
    return np.ascontiguousarray(np.ascontiguousarray(words).view(np.uint8)[..., of]).view(np.uint32)[..., 0]


COMPUTED["prmt.b32"] = permuted


def names(text: str) -> list[str]:
    return text.strip("{}").split(", ")


def halves(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (words << 16).view(np.float32), (words & 0xFFFF0000).view(np.float32)

"""Sums of 24 bits by twos: the PTX that writes and reads them, by a small interpreter."""

import re

import numpy as np
import pytest

from odelm.models.kernels.layout import ROWS, THREADS
from odelm.models.kernels.paired import columns_text
from odelm.models.kernels.sums import PACK, row_text, state_text, unpack_text
from tests.kernels.warps import Warps

MARK = 0x12345
"""More than 16 bits: a word has the lower ones."""
THREAD = np.arange(THREADS, dtype=np.uint32)
ROW = 16 * (THREAD // 32) + THREAD % 32 // 4
"""The first of a thread's two rows of a product (PTX, "Register Fragments for wgmma")."""


def cut(x: np.ndarray) -> np.ndarray:
    """Returns numbers without their lowest 8 bits."""
    return (x.view(np.uint32) & 0xFFFFFF00).view(np.float32)


def unpacked(memory: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of words, and their marks, by the PTX that a reader runs."""
    words = memory.view(np.uint32).reshape(-1, 2)
    assert len(words) <= THREADS
    lower, upper = (np.resize(half, THREADS) for half in words.T)
    warps = Warps(memory, [0.0, 0.0, lower, upper])
    warps.run(unpack_text("$2", "$3", "$0", "$1"))
    both = np.stack([warps.registers["$0"], warps.registers["$1"]], axis=1)[: len(words)]
    return np.ascontiguousarray(both).view(np.float32).reshape(-1), words[:, 0] & 0xFFFF


def numbers_of(shape: tuple[int, ...]) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=shape) * 10.0 ** np.random.default_rng(1).integers(-8, 8, shape)
    x = x.astype(np.float32)
    x.flat[:4] = np.nan, np.inf, -np.inf, 0
    return x


def test_a_product_is_written_by_twos_and_read_with_24_bits():
    x, memory = numbers_of((ROWS,)), np.full(4 * ROWS, 255, np.uint8)
    Warps(memory, [np.uint64(0), ROW, x[ROW], x[ROW + 8], np.uint32(MARK), THREAD]).run(row_text())
    found, marks = unpacked(memory)
    np.testing.assert_array_equal(found, cut(x))
    assert (marks == MARK & 0xFFFF).all()
    real = np.isfinite(x)
    np.testing.assert_allclose(found[real], x[real], rtol=2**-15)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (5, 8), (17, 24)])
def test_each_column_of_a_product_is_written_by_twos(rows, columns):
    y, stride = numbers_of((ROWS, columns)), ROWS // 2
    memory = np.full(8 * stride * columns, 255, np.uint8)
    for first_row in (0, 8):
        for first_column in range(0, columns, 8):
            row, column = ROW + first_row, first_column + 2 * (THREAD % 4)
            given = [np.uint64(0), row, column, y[row, column], y[row, column + 1], np.uint32(MARK)]
            Warps(memory, given).run(columns_text(stride, rows, PACK))
    for column, words in enumerate(memory.reshape(columns, -1)):
        found, marks = unpacked(words)
        assert (marks == MARK & 0xFFFF).all() if column < rows else (marks != MARK & 0xFFFF).all()
        if column < rows:
            np.testing.assert_array_equal(found, cut(y[:, column]))


@pytest.mark.parametrize("n", [256, 768, 1024])
def test_a_state_is_read_together_with_its_sums(n):
    """The PTX is run once through: its loops end as soon as all marks are right."""
    x, registers, sums = numbers_of((3, n)), n // (2 * THREADS), 2
    words = np.zeros((n + sums * n // 2, 2), np.uint32)
    words[:n] = np.stack([x[0].view(np.uint32), np.full(n, MARK, np.uint32)], axis=1)
    lower = [x[r, 1::2].view(np.uint32) << 8 & 0xFFFF0000 | MARK & 0xFFFF for r in (1, 2)]
    upper = [x[r, 0::2].view(np.uint32) & 0xFFFFFF00 | x[r, 1::2].view(np.uint32) >> 24 for r in (1, 2)]
    words[n:] = np.stack([np.concatenate(lower), np.concatenate(upper)], axis=1)
    bases = [16 * THREAD, 8 * n + 8 * THREAD, 12 * n + 8 * THREAD]
    count = 2 * registers * (1 + sums)
    for wrong in (None, 8 * 3 + 4, 8 * (n + 5), 8 * (n + 5) + 1, 8 * (n + n // 2), 8 * (2 * n - 1)):
        memory = words.view(np.uint8).reshape(-1).copy()
        if wrong is not None:
            memory[wrong] ^= 1
        found = Loop(memory, [*np.zeros((count, THREADS)), *(one.astype(np.uint64) for one in bases), np.uint32(MARK)])
        found.run(re.sub(r"(last|others):\s|@wrong bra \w+;", "", state_text(sums, registers)).replace("; }", ";"))
        assert found.seen == (wrong is None)
        if wrong is None:
            outputs = np.stack([found.registers[f"${i}"].view(np.uint32) for i in range(count)]).view(np.float32)
            got = outputs.reshape(1 + sums, registers, 2, THREADS).transpose(0, 1, 3, 2).reshape(1 + sums, n)
            np.testing.assert_array_equal(got, np.concatenate([x[:1], cut(x[1:])]))


class Loop(Warps):
    """Warps that read words of 64 bits, and say whether no thread has seen a wrong mark."""

    seen = True

    def do(self, operation: str, given: list[str], chosen: np.ndarray) -> None:
        if operation.startswith("ld.relaxed"):
            names = given[0].strip("{}").split(", ")
            at = self.address(given[1])
            for i, name in enumerate(names):
                self.registers[name] = np.array([self.memory[a + 8 * i : a + 8 * i + 8].view(np.uint64)[0] for a in at])
        elif operation == "mov.b64" and given[0].startswith("{"):
            low, high = given[0].strip("{}").split(", ")
            word = self.registers[given[1]]
            self.registers |= {low: word.astype(np.uint32), high: (word >> np.uint64(32)).astype(np.uint32)}
        elif operation == "setp.ne.b32":
            self.seen &= not self.registers["all"].any()
        else:
            super().do(operation, given, chosen)

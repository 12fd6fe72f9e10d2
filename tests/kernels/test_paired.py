"""Marked numbers by twos: the PTX that writes them, by a small interpreter. Only a card shows when readers see it."""

import jax.numpy as jnp
import numpy as np
import pytest

from odelm.models.kernels.layout import ROWS, THREADS
from odelm.models.kernels.paired import COLUMNS_TEXT, put_text
from tests.kernels.warps import Warps

MARK = np.uint32(7)
THREAD = np.arange(THREADS, dtype=np.uint32)


def bits(x: np.ndarray) -> np.ndarray:
    """Returns the bits of numbers rounded to bfloat16."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).view(np.uint16)


def read(memory: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bits of the numbers, two a word, and the marks."""
    words = memory.view(np.uint32).reshape(-1, 2)
    return np.stack([words[:, 0] & 0xFFFF, words[:, 0] >> 16], axis=1).reshape(-1), words[:, 1]


def test_a_thread_writes_two_numbers_and_a_mark():
    x = np.random.default_rng(0).normal(size=2 * THREADS).astype(np.float32)
    memory = np.full(8 * THREADS, 255, np.uint8)
    given = [8 * THREAD, x[0::2], x[1::2], MARK]
    Warps(memory, given).run(put_text(chosen=False))
    numbers, marks = read(memory)
    np.testing.assert_array_equal(numbers, bits(x))
    assert (marks == MARK).all()

    memory = np.full(8 * THREADS, 255, np.uint8)
    chosen = THREAD % 3 == 0
    Warps(memory, [*given, chosen]).run(put_text(chosen=True))
    numbers, marks = read(memory)
    np.testing.assert_array_equal(numbers.reshape(-1, 2)[chosen], bits(x).reshape(-1, 2)[chosen])
    np.testing.assert_array_equal(marks == MARK, chosen)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (5, 8), (32, 32), (17, 24)])
def test_each_column_of_a_product_becomes_words_beside_each_other(rows, columns):
    """Threads hold a product's columns as the tensor core leaves them (PTX, "Register Fragments for wgmma")."""
    y = np.random.default_rng(1).normal(size=(ROWS, columns)).astype(np.float32)
    stride = ROWS  # words from a column to the next, of which half are its own
    memory = np.full(8 * stride * columns, 255, np.uint8)
    warp, lane = THREAD // 32, THREAD % 32
    odd = lane // 4 % 2
    for first_row in (0, 8):
        for first_column in range(0, columns, 8):
            row, column = 16 * warp + lane // 4 + first_row, first_column + 2 * (lane % 4)
            address = 8 * ((column + odd) * stride + row // 2)
            given = [address, y[row, column], y[row, column + 1], MARK, odd == 1, column + odd < rows]
            Warps(memory, given).run(COLUMNS_TEXT)
    numbers, marks = (x.reshape(columns, -1) for x in read(memory))
    np.testing.assert_array_equal(numbers[:rows, :ROWS], bits(y.T[:rows]))
    assert (marks[:rows, : ROWS // 2] == MARK).all()
    assert (marks[:rows, ROWS // 2 :] != MARK).all() and (marks[rows:] != MARK).all()

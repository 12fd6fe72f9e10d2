"""Marked numbers by twos: the PTX that writes them, by a small interpreter. Only a card shows when readers see it."""

import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from odelm.models.kernels.layout import ROWS, THREADS
from odelm.models.kernels.marked import loop_text
from odelm.models.kernels.paired import columns_text, put_text
from odelm.models.kernels.program import Program
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


def test_threads_write_two_numbers_and_a_mark_each():
    x = np.random.default_rng(0).normal(size=2 * THREADS).astype(np.float32)
    for chosen in (None, THREAD % 3 == 0):
        memory = np.full(8 * THREADS, 255, np.uint8)
        given = [np.uint64(0), 2 * THREAD, x[0::2], x[1::2], MARK, *([] if chosen is None else [chosen])]
        Warps(memory, given).run(put_text(chosen=chosen is not None))
        numbers, marks = read(memory)
        mine = np.ones(THREADS, bool) if chosen is None else chosen
        np.testing.assert_array_equal(numbers.reshape(-1, 2)[mine], bits(x).reshape(-1, 2)[mine])
        np.testing.assert_array_equal(marks == MARK, mine)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (5, 8), (32, 32), (17, 24)])
def test_each_column_of_a_product_becomes_words_beside_each_other(rows, columns):
    """Threads hold a product's columns as the tensor core leaves them (PTX, "Register Fragments for wgmma")."""
    y = np.random.default_rng(1).normal(size=(ROWS, columns)).astype(np.float32)
    stride = ROWS  # words from a column to the next, of which half are its own
    memory = np.full(8 * stride * columns, 255, np.uint8)
    warp, lane = THREAD // 32, THREAD % 32
    for first_row in (0, 8):
        for first_column in range(0, columns, 8):
            row, column = 16 * warp + lane // 4 + first_row, first_column + 2 * (lane % 4)
            given = [np.uint64(0), row, column, y[row, column], y[row, column + 1], MARK]
            Warps(memory, given).run(columns_text(stride, rows))
    numbers, marks = (x.reshape(columns, -1) for x in read(memory))
    np.testing.assert_array_equal(numbers[:rows, :ROWS], bits(y.T[:rows]))
    assert (marks[:rows, : ROWS // 2] == MARK).all()
    assert (marks[:rows, ROWS // 2 :] != MARK).all() and (marks[rows:] != MARK).all()


@pytest.mark.parametrize("n", [256, 512, 768, 1024])
def test_a_thread_reads_the_words_of_its_own_numbers(n):
    """A thread's registers hold two numbers each, `2 * THREADS` apart, and its address is that of the first."""
    registers = n // (2 * THREADS)
    text = loop_text(1, registers, 1, n // 2 // registers, outputs=registers)
    offsets = [int(found) for found in re.findall(r"ld\.relaxed\.gpu\.global\.b64 w\d+, \[\$\d+ \+ (\d+)\]", text)]
    words = np.arange(n // 2)
    read_by = np.concatenate([(8 * THREAD + offset) // 8 for offset in offsets])
    np.testing.assert_array_equal(np.sort(read_by), words)
    first = [2 * thread + 2 * THREADS * register for register in range(registers) for thread in range(THREADS)]
    np.testing.assert_array_equal(2 * read_by, first)


def test_the_place_of_some_numbers_is_that_of_their_words():
    class Array:
        at = property(lambda self: self)

        def __getitem__(self, place):
            return place

    names = ("up", "state")
    program = SimpleNamespace(between={name: Array() for name in names}, paired=lambda name: name == "up")
    for name, place in (("up", pl.ds(64, 128)), ("state", pl.ds(128, 256))):
        assert Program.place(program, name, 3, 0, pl.ds(128, 256)) == (3, 0, place)
    assert Program.place(program, "up", 3, 1) == (3, 1)

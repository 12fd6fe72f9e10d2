"""Products by the warps themselves: the PTX, by a small interpreter of it. Only a card shows what it makes of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from odelm.models.kernels.by_warps import product_text, put_text
from odelm.models.kernels.layout import ROWS, THREADS
from tests.kernels.warps import Warps


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

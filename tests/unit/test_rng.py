"""Keys and generators are functions of (seed, stream, step), and nothing else."""

import itertools

import jax
import numpy as np

from odelm import rng

PLACES = list(itertools.product((0, 1), ("dropout", "steps"), (0, 1, 2)))


def test_host_repeats_and_differs_from_place_to_place():
    draws = [rng.host(*place).integers(2**62) for place in PLACES]
    assert draws == [rng.host(*place).integers(2**62) for place in PLACES]
    assert len(set(draws)) == len(PLACES)


def test_key_repeats_and_differs_from_place_to_place():
    data = [tuple(np.asarray(jax.random.key_data(rng.key(*place)))) for place in PLACES]
    assert data == [tuple(np.asarray(jax.random.key_data(rng.key(*place)))) for place in PLACES]
    assert len(set(data)) == len(PLACES)


def test_key_takes_a_traced_step():
    traced = jax.jit(lambda step: jax.random.key_data(rng.key(3, "dropout", step)))(np.int32(7))
    np.testing.assert_array_equal(traced, jax.random.key_data(rng.key(3, "dropout", 7)))


def test_values_stay_what_they_were():
    """A run resumed with a later version draws what it would have drawn: these numbers must not change."""
    assert rng.host(0, "steps", 5).integers(1000, size=4).tolist() == GOLDEN_HOST
    assert np.asarray(jax.random.key_data(rng.key(0, "dropout", 5))).tolist() == GOLDEN_KEY


def test_bits_are_a_function_of_the_row_alone():
    rows = np.array([7, 0, 2**40])
    together = rng.bits(0, "mask", rows, 5)
    assert together.shape == (3, 5) and together.dtype == np.uint64
    for row, expected in zip(rows, together, strict=True):
        np.testing.assert_array_equal(rng.bits(0, "mask", np.array([row]), 5)[0], expected)
    assert (rng.bits(1, "mask", rows, 5) != together).all() and (rng.bits(0, "steps", rows, 5) != together).all()
    assert rng.bits(0, "mask", np.array([3]), 2).tolist() == GOLDEN_BITS


def test_bits_are_uniform_and_their_rows_and_places_independent():
    """Of 400,000 fair bits 200,000 are set, with deviation 316; correlations of n numbers have deviation 1/sqrt(n)."""
    draws = rng.bits(5, "mask", np.arange(2000), 200)
    assert len(np.unique(draws)) == draws.size
    for bit in (0, 31, 63):
        assert abs(int((draws >> np.uint64(bit) & np.uint64(1)).sum()) - 200_000) < 5 * 316
    shares = draws / 2.0**64
    for left, right in ((shares[:-1], shares[1:]), (shares[:, :-1], shares[:, 1:])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 5 / np.sqrt(left.size)


GOLDEN_BITS = [[11952671723658432385, 392452612340270260]]
GOLDEN_HOST = [130, 295, 971, 626]
GOLDEN_KEY = [1805474295, 133033650]

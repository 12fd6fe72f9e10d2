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


GOLDEN_HOST = [130, 295, 971, 626]
GOLDEN_KEY = [1805474295, 133033650]

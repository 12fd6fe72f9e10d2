"""Depth-time grids: exact ends, every mistake named, and the distribution of the random ones."""

import numpy as np
import pytest

from odelm import rng
from odelm.errors import InputError
from odelm.ode import grid


def test_equal():
    times = grid.equal(12, 3)
    assert times.dtype == np.float32
    np.testing.assert_array_equal(times, [0, 4, 8, 12])


@pytest.mark.parametrize("depth, steps", [(12, 7), (1, 3), (24, 11)])
def test_equal_ends_exactly_at_the_depth(depth, steps):
    times = grid.equal(depth, steps)
    assert len(times) == steps + 1 and times[0] == 0 and times[-1] == depth
    # Each time is a float64 rounded once to float32, so a size is off by two half-units of the depth.
    np.testing.assert_allclose(np.diff(times), depth / steps, rtol=0, atol=depth * 1.2e-7)


@pytest.mark.parametrize("depth", [1, 12, 95])
def test_the_most_equal_steps_are_all_above_0(depth):
    assert np.diff(grid.equal(depth, grid.MAX_STEPS)).min() > 0


def test_from_sizes():
    np.testing.assert_array_equal(grid.from_sizes([1, 2, 0.5]), np.float32([0, 1, 3, 3.5]))
    np.testing.assert_array_equal(grid.from_sizes([1, 2, 1], depth=12), np.float32([0, 3, 9, 12]))


def test_a_grid_is_cut_at_boundaries_that_it_contains():
    stretches = grid.cut(np.array([0, 1, 2, 2.5, 3, 6], np.float32), [0, 2, 3, 6])
    assert [part.tolist() for part in stretches] == [[0, 1, 2], [2, 2.5, 3], [3, 6]]


def test_boundaries():
    np.testing.assert_array_equal(grid.boundaries(12, 3), [0, 4, 8, 12])


def test_checked_returns_float32():
    times = grid.checked([0, 2, 6, 12], 12, groups=2)
    assert times.dtype == np.float32
    np.testing.assert_array_equal(times, [0, 2, 6, 12])


@pytest.mark.parametrize(
    "times, groups, message",
    [
        ([[0, 12]], 1, r"a grid has shape \(1, 2\), expected \(N \+ 1,\)"),
        ([0], 1, r"a grid has shape \(1,\)"),
        ([0, np.nan, 12], 1, r"grid\[1\] is nan, expected finite"),
        ([0, 3, np.inf], 1, r"grid\[2\] is inf, expected finite"),
        ([1, 3, 12], 1, r"grid\[0\] is 1, expected 0"),
        ([0, 3, 2, 12], 1, r"grid\[2\] is 2, not above grid\[1\] = 3"),
        ([0, 3, 3, 12], 1, r"grid\[2\] is 3, not above grid\[1\] = 3"),
        ([0, 3, 11], 1, r"grid\[2\] is 11, expected 12, where depth time ends"),
        ([0, 3, 12], 2, r"lacks 6, a boundary between groups"),
        (["a", 12], 1, r"a grid is \['a', 12\], expected numbers"),
        ([[0, 1], 12], 1, "expected numbers"),
    ],
)
def test_checked_names_what_is_wrong(times, groups, message):
    with pytest.raises(InputError, match=message):
        grid.checked(times, 12, groups)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: grid.equal(12, 10**20), "steps is 100000000000000000000, expected at most 4194304"),
        (lambda: grid.equal(12, 0), "steps is 0, expected a whole number of at least 1"),
        (lambda: grid.from_sizes([]), r"shape \(0,\)"),
        (lambda: grid.from_sizes([[1.0]]), r"shape \(1, 1\)"),
        (lambda: grid.from_sizes([1, 0, 2]), "step size 1 is 0"),
        (lambda: grid.from_sizes([1, 2, -3]), "step size 2 is -3"),
        (lambda: grid.from_sizes([1, np.nan]), "step size 1 is nan"),
        (lambda: grid.from_sizes([1, np.inf, 2]), "step size 1 is inf, expected only finite positive"),
        (lambda: grid.from_sizes(["a"]), "expected numbers"),
        (lambda: grid.equal(4, 2.5), "steps is 2.5, expected a whole number"),
    ],
)
def test_bad_sizes_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(
    "draw",
    [lambda *a, **k: grid.draw_sizes(*a, low=0.5, high=1.5, **k), lambda *a, **k: grid.draw_equal(*a, jitter=0.5, **k)],
)
def test_draws_are_grids_with_the_boundaries(draw, groups):
    for step in range(20):
        times = draw(rng.host(0, "steps", step), 12, 6, groups=groups)
        np.testing.assert_array_equal(grid.checked(times, 12, groups), times)
        shares = np.diff(times).reshape(groups, -1)
        # Sizes are between 1/2 and 3/2 before scaling, so no two of a group differ by more than 3 times; 1e-5
        # allows for the float32 rounding of times near 12.
        assert (shares.max(axis=1) / shares.min(axis=1) < 3 + 1e-5).all()
        assert len(set(np.diff(times))) > 1


def test_draws_repeat_for_a_seed_and_update_only():
    def draw(seed, update):
        return grid.draw_sizes(rng.host(seed, "steps", update), 12, 6, low=0.5, high=1.5)

    np.testing.assert_array_equal(draw(0, 3), draw(0, 3))
    assert (draw(0, 3) != draw(0, 4)).any() and (draw(0, 3) != draw(1, 3)).any()


def test_no_jitter_draws_nothing():
    generator = rng.host(0, "steps")
    np.testing.assert_array_equal(grid.draw_equal(generator, 12, 4), grid.equal(12, 4))
    assert generator.integers(2**62) == rng.host(0, "steps").integers(2**62)


def test_sizes_are_uniform():
    """The ratio of a size to the sum before scaling is known for two steps: u / (u + v) of two uniform draws."""
    generator, draws = rng.host(0, "steps"), 4000
    shares = [grid.draw_sizes(generator, 1, 2, low=0.5, high=1.5)[1] for _ in range(draws)]
    pairs = np.random.default_rng(1).uniform(0.5, 1.5, (100_000, 2))
    expected = np.sort(pairs[:, 0] / pairs.sum(axis=1))
    distance = np.abs(np.searchsorted(expected, np.sort(shares)) / len(expected) - np.arange(draws) / draws).max()
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded with probability 0.001, and the seed is fixed.
    assert distance < 1.95 / np.sqrt(draws * 100_000 / (draws + 100_000))


@pytest.mark.parametrize("weights, p", [((), (1 / 3, 1 / 3, 1 / 3)), ((1, 0, 3), (1 / 4, 0, 3 / 4))])
def test_counts_follow_the_weights(weights, p):
    generator, draws, counts = rng.host(0, "counts"), 3000, (3, 6, 12)
    seen = np.array([grid.draw_count(generator, counts, weights) for _ in range(draws)])
    observed, expected = np.array([(seen == count).sum() for count in counts]), draws * np.array(p)
    assert observed.sum() == draws and (observed[expected == 0] == 0).all()
    chi_square = ((observed - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 13.8  # exceeded with probability 0.001 at two degrees of freedom; the seed is fixed

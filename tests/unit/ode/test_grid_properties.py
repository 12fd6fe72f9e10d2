"""What holds of every grid of depth time, whatever the depth, the groups and the draws."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from odelm.ode import grid

depths = st.integers(1, 4096)
lengths = depths | st.floats(0.01, 4096)
"""Depth as a length of time: a number of layers, or any other."""
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def cores(draw) -> tuple[float, int, int]:
    """Returns a depth, a number of groups, and a number of steps that divides over them."""
    groups = draw(st.integers(1, 24))
    return draw(lengths), groups, groups * draw(st.integers(1, 24))


def assert_is_grid(times: np.ndarray, depth: float, groups: int, steps: int) -> None:
    assert times.dtype == np.float32 and len(times) == steps + 1
    sizes = np.diff(times.astype(np.float64))
    assert (sizes > 0).all(), "two times are one in float32"
    assert times[0] == 0 and times[-1] == np.float32(depth)
    # A sum of float64 differences of float32 times, which telescopes: at most a rounding of 1.1e-16 a step.
    np.testing.assert_allclose(sizes.sum(), float(np.float32(depth)), rtol=steps * 1.2e-16)
    bounds = grid.boundaries(depth, groups)
    np.testing.assert_array_equal(times[:: steps // groups], bounds)
    np.testing.assert_array_equal(grid.checked(times, depth, groups), times)
    stretches = grid.cut(times, bounds)
    assert [len(stretch) - 1 for stretch in stretches] == [steps // groups] * groups
    assert all(left[-1] == right[0] for left, right in zip(stretches[:-1], stretches[1:], strict=True))


@given(cores())
def test_equal_steps(core):
    depth, groups, steps = core
    times = grid.equal(depth, steps)
    assert_is_grid(times, depth, groups, steps)
    # Each time is a float64 rounded once to float32, so a size is off by two half-units of the depth.
    np.testing.assert_allclose(np.diff(times.astype(np.float64)), depth / steps, rtol=0, atol=depth * 1.2e-7)


# A boundary that lies between two float32 numbers, where a sum of sizes that is off by a rounding takes the wrong one.
@example((2 + 2**-23, 2, 22), np.random.default_rng(3), 0.5, 1.5)
@example((2 + 2**-23, 2, 22), np.random.default_rng(4), 0.5, 1.5)
@given(cores(), generators, st.floats(0.1, 1), st.floats(1, 10))
def test_drawn_sizes(core, generator, low, high):
    depth, groups, steps = core
    times = grid.draw_sizes(generator, depth, steps, low=low, high=high, groups=groups)
    assert_is_grid(times, depth, groups, steps)
    shares = np.diff(times.astype(np.float64)).reshape(groups, -1)
    # Before they are scaled sizes lie between low and high; rounding moves one by two half-units of the depth.
    assert (shares.max(axis=1) <= shares.min(axis=1) * high / low + depth * 1.2e-7 * (1 + high / low)).all()


@given(cores(), generators, st.floats(0, 0.9))
def test_equal_steps_with_jitter(core, generator, jitter):
    depth, groups, steps = core
    assert_is_grid(grid.draw_equal(generator, depth, steps, jitter=jitter, groups=groups), depth, groups, steps)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=200), lengths)
def test_sizes_scaled_to_a_depth_keep_their_proportions(sizes, depth):
    times = grid.from_sizes(sizes, depth=depth)
    assert_is_grid(times, depth, 1, len(sizes))
    expected = np.array(sizes) * (depth / np.sum(sizes))
    np.testing.assert_allclose(np.diff(times.astype(np.float64)), expected, rtol=0, atol=depth * 1.3e-7)

"""Depth-time grids: the increasing times `0 = t_0 < ... < t_N = depth` that an integration visits.

Depth `L` is a time interval `[0, L]`; the ordinary model walks it in unit steps. A grid is a float32 NumPy
array of shape (N + 1,), made on the host. The draws of pre-training (`draw_*`) take a NumPy generator that
the caller makes from (seed, update), so that every process draws the same grid and a resumed run repeats it.
"""

from collections.abc import Sequence

import numpy as np

from odelm.arguments import whole
from odelm.errors import InputError

Times = Sequence[float] | np.ndarray
MAX_STEPS = 1 << 22
"""The most equal steps: if there are more, some are 0 in float32."""


def equal(depth: float, steps: int) -> np.ndarray:
    """Returns `steps` equal steps from 0 to `depth`, shape (steps + 1,)."""
    steps = whole("steps", steps)
    if steps > MAX_STEPS:
        raise InputError(
            f"steps is {steps}, expected at most {MAX_STEPS}: of more the times are not distinct in float32"
        )
    return _exact_end(np.arange(steps + 1) * (depth / steps), depth)


def from_sizes(sizes: Times, *, depth: float | None = None) -> np.ndarray:
    """Returns the grid with the given step sizes, scaled to span `depth` if one is given."""
    steps = _numbers(sizes)
    if steps.ndim != 1 or not len(steps):
        raise InputError(f"step sizes have shape {steps.shape}, expected (N,) with N of at least 1")
    good = np.isfinite(steps) & (steps > 0)
    if not good.all():
        bad = int(np.argmin(good))
        raise InputError(f"step size {bad} is {steps[bad]:g}, expected only finite positive sizes")
    times = np.concatenate([[0.0], np.cumsum(steps)])
    return _exact_end(times if depth is None else times * (depth / times[-1]), depth or times[-1])


def increasing(grid: Times, dtype: type | np.dtype = np.float32) -> np.ndarray:
    """Returns `grid` (N + 1,) in a float `dtype`, or raises InputError naming the entry that is wrong.

    Times are two or more, finite, and strictly increasing once they are rounded to `dtype`.
    """
    times = _numbers(grid).astype(dtype)
    if times.ndim != 1 or len(times) < 2:
        raise InputError(f"a grid has shape {times.shape}, expected (N + 1,) with at least one step")
    if not np.isfinite(times).all():
        bad = int(np.argmin(np.isfinite(times)))
        raise InputError(f"grid[{bad}] is {times[bad]:g}, expected finite times")
    backward = np.flatnonzero(np.diff(times) <= 0)
    if len(backward):
        i = int(backward[0]) + 1
        raise InputError(f"grid[{i}] is {times[i]:g}, not above grid[{i - 1}] = {times[i - 1]:g}; times must increase")
    return times


def checked(grid: Times, depth: float, groups: int = 1) -> np.ndarray:
    """Returns `grid` as float32 (N + 1,), or raises InputError naming the entry that is wrong.

    A grid starts at 0, strictly increases, ends at `depth`, and contains the group boundaries
    `depth * g / groups`, because no step may straddle two blocks.
    """
    times = increasing(grid)
    if times[0] != 0:
        raise InputError(f"grid[0] is {times[0]:g}, expected 0, where depth time starts")
    if times[-1] != np.float32(depth):
        raise InputError(f"grid[{len(times) - 1}] is {times[-1]:g}, expected {depth:g}, where depth time ends")
    for boundary in boundaries(depth, groups):
        if boundary not in times:
            raise InputError(f"the grid {times.tolist()} lacks {boundary:g}, a boundary between groups; add that time")
    return times


def boundaries(depth: float, groups: int) -> np.ndarray:
    """Returns the times where one group's block hands over to the next, ends included, (groups + 1,)."""
    return equal(depth, groups)


def cut(grid: Times, boundaries: Times) -> list[np.ndarray]:
    """Returns the stretches of a grid between boundaries that it contains, each with its two ends."""
    at = np.searchsorted(grid, boundaries)
    return [np.asarray(grid)[start : stop + 1] for start, stop in zip(at[:-1], at[1:], strict=True)]


def draw_sizes(
    rng: np.random.Generator, depth: float, count: int, *, low: float, high: float, groups: int = 1
) -> np.ndarray:
    """Draws `count` steps whose sizes are i.i.d. U(low, high), scaled to span the depth.

    This is the literal reading of "random step sizes" (Chen et al. 2023, arXiv 2310.12818). With several
    groups each group's stretch of time gets an equal share of the steps, scaled to span it.
    """
    sizes = rng.uniform(low, high, (groups, count // groups))
    sizes /= sizes.sum(axis=1, keepdims=True)
    return _pinned(from_sizes(sizes.ravel(), depth=depth), depth, groups)


def draw_equal(
    rng: np.random.Generator, depth: float, count: int, *, jitter: float = 0.0, groups: int = 1
) -> np.ndarray:
    """Returns `count` equal steps, or with `jitter` sizes drawn from U(1 - jitter, 1 + jitter), rescaled."""
    if not jitter:
        return equal(depth, count)
    return draw_sizes(rng, depth, count, low=1 - jitter, high=1 + jitter, groups=groups)


def draw_count(rng: np.random.Generator, counts: Sequence[int], weights: Sequence[float] = ()) -> int:
    """Draws one of `counts`, with relative probabilities `weights` (uniform when empty)."""
    p = np.asarray(weights, np.float64) / np.sum(weights) if len(weights) else None
    return int(rng.choice(np.asarray(counts), p=p))


def _numbers(values: Times) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"a grid is {values!r:.100}, expected numbers such as [0, 4, 12]") from error


def _pinned(times: np.ndarray, depth: float, groups: int) -> np.ndarray:
    times[:: (len(times) - 1) // groups] = boundaries(depth, groups)
    return times


def _exact_end(times: np.ndarray, depth: float) -> np.ndarray:
    times = times.astype(np.float32)
    times[-1] = depth
    return times

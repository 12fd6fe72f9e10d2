"""Ways to cross the depth in fewer evaluations than full depth, for a search among them."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from odelm import ode
from odelm.config import ModelConfig
from odelm.evals.sweep import Setting

SOLVERS = ("euler", "midpoint", "heun")
FEW_STEPS = 3
"""With fewer than so many steps beyond the one that each group needs, all grids of whole times are tried, unless there
are more than `MANY_GRIDS`; with more steps, the grid with the smallest sum of local errors."""
MANY_GRIDS = 300

Times = tuple[float, ...]
"""The times of a grid over the core, (steps + 1,)."""


def solvers_for(config: ModelConfig) -> tuple[str, ...]:
    """Returns the solvers that the model can take."""
    return SOLVERS if config.kv_span == 1 else ("euler",)


def full_depth(config: ModelConfig) -> Setting:
    """Returns the crossing that all others are compared with."""
    return Setting("euler", config.core)


def crossing(config: ModelConfig, solver: str, grid: Times) -> Setting:
    """Returns a grid over the core as a setting, which has only a number of steps if these are equal."""
    steps = len(grid) - 1
    equal = steps % config.groups == 0 and grid == times_of(config, Setting(solver, steps))
    return Setting(solver, steps, grid=None if equal else grid)


def times_of(config: ModelConfig, setting: Setting) -> Times:
    """Returns the times over the core that a setting with a number of steps visits."""
    assert setting.steps is not None
    return setting.grid or tuple(ode.grid.equal(config.core, setting.steps).tolist())


def evaluations_of(config: ModelConfig, setting: Setting) -> int:
    """Returns how often a forward pass applies a block, prelude and coda included."""
    assert setting.steps is not None
    return config.ends + ode.evaluations(setting.solver, setting.steps)


def is_cheaper(config: ModelConfig, setting: Setting) -> bool:
    """Returns whether a setting takes fewer evaluations than full depth."""
    return evaluations_of(config, setting) < config.depth


def equal_steps(config: ModelConfig) -> list[Setting]:
    """Returns every number of equal steps that is a multiple of the groups, with every solver, if cheaper than full
    depth."""
    counts = range(config.groups, config.core, config.groups)
    found = [Setting(solver, count) for solver in solvers_for(config) for count in counts]
    return [setting for setting in found if is_cheaper(config, setting)]


def searched_grids(config: ModelConfig, errors: np.ndarray) -> list[Setting]:
    """Returns grids of whole times for Euler's method: all grids of few steps, and for more steps the best one by
    `best_grids`."""
    core, groups, found = config.core, config.groups, []
    for steps, grid in best_grids(errors).items():
        if steps >= core:
            continue
        count = math.comb(core - groups, steps - groups)
        every = steps < groups + FEW_STEPS and count <= MANY_GRIDS
        found += all_grids(core, groups, steps) if every else [grid]
    return list(dict.fromkeys(crossing(config, "euler", grid) for grid in found))


def all_grids(core: int, groups: int, steps: int) -> Iterator[Times]:
    """Yields every grid of so many steps with whole times that contains the boundaries between groups."""
    boundaries = set(range(0, core + 1, core // groups))
    free = [time for time in range(core) if time not in boundaries]
    for chosen in itertools.combinations(free, steps - groups):
        yield tuple(map(float, sorted(boundaries.union(chosen))))


def with_one_more(core: int, grid: Times) -> list[Times]:
    """Returns the grids that have one more whole time than `grid`."""
    return [tuple(sorted((*grid, float(time)))) for time in range(core) if time not in grid]


def best_grids(errors: np.ndarray) -> dict[int, Times]:
    """Returns for each number of steps the grid of whole times whose local errors have the smallest sum.

    Args:
        errors: float (C, C + 1), what a step from time i to j costs, inf where there is no such step.

    By dynamic programming: the best grid of n steps to time j ends with a step from some time i, and up to i it is the
    best grid of n - 1 steps. Numbers of steps without such a grid are left out.
    """
    core = len(errors)
    cost, found = np.full(core + 1, np.inf), {}
    cost[0] = 0.0
    before: list[np.ndarray] = []
    for steps in range(1, core + 1):
        sums = cost[:core, None] + errors
        before.append(sums.argmin(axis=0))
        cost = sums.min(axis=0)
        if np.isfinite(cost[core]):
            found[steps] = _traced_back(before, core)
    return found


def _traced_back(before: list[np.ndarray], core: int) -> Times:
    """Returns the times of the grid that ends at `core`, given the best time before each, step by step."""
    times = [core]
    for last in reversed(before):
        times.append(int(last[times[-1]]))
    return tuple(map(float, reversed(times)))

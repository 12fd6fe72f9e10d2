"""Which grids are searched, and that dynamic programming finds the best of all."""

import itertools

import numpy as np
import pytest

from odelm.evals.candidates import (
    all_grids,
    best_grids,
    crossing,
    equal_steps,
    evaluations_of,
    searched_grids,
    times_of,
)
from odelm.evals.sweep import Setting


def random_errors(core: int, groups: int = 1, *, seed: int = 0) -> np.ndarray:
    """Returns random costs of steps, inf for those back or across a boundary."""
    share, errors = core // groups, np.random.default_rng(seed).random((core, core + 1))
    for i, j in itertools.product(range(core), range(core + 1)):
        if j <= i or j > (i // share + 1) * share:
            errors[i, j] = np.inf
    return errors


def cost(errors: np.ndarray, grid: tuple[float, ...]) -> float:
    return sum(errors[int(i), int(j)] for i, j in itertools.pairwise(grid))


@pytest.mark.parametrize(("core", "groups"), [(9, 1), (8, 2), (6, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_dynamic_programming_finds_what_trying_all_finds(core, groups, seed):
    errors = random_errors(core, groups, seed=seed)
    found = best_grids(errors)
    assert sorted(found) == list(range(groups, core + 1))
    for steps, grid in found.items():
        every = list(all_grids(core, groups, steps))
        assert grid == min(every, key=lambda grid: cost(errors, grid))
        assert len(grid) == steps + 1


def test_all_grids_contain_the_boundaries():
    assert list(all_grids(4, 1, 2)) == [(0, 1, 4), (0, 2, 4), (0, 3, 4)]
    assert list(all_grids(6, 2, 3)) == [(0, 1, 3, 6), (0, 2, 3, 6), (0, 3, 4, 6), (0, 3, 5, 6)]
    assert len(list(all_grids(12, 1, 3))) == 55


def test_equal_steps_take_every_count_and_solver_below_full_depth(make_config):
    found = {(s.solver, s.steps): evaluations_of(make_config(depth=6), s) for s in equal_steps(make_config(depth=6))}
    euler = {("euler", n): n for n in range(1, 6)}
    assert found == euler | {(solver, n): 2 * n for solver in ("midpoint", "heun") for n in (1, 2)}
    with_ends = make_config(depth=8, prelude=1, coda=1, groups=2)
    euler = {("euler", 2): 4, ("euler", 4): 6}
    heun = {(solver, 2): 6 for solver in ("midpoint", "heun")}
    assert {(s.solver, s.steps): evaluations_of(with_ends, s) for s in equal_steps(with_ends)} == euler | heun


def test_few_steps_try_every_grid_and_more_the_best_by_local_errors(make_config):
    config = make_config(depth=12)
    errors = random_errors(12)
    found = searched_grids(config, errors)
    counts = {n: sum(setting.steps == n for setting in found) for n in range(1, 12)}
    assert counts == {1: 1, 2: 11, 3: 55, **{n: 1 for n in range(4, 12)}}
    five = next(setting for setting in found if setting.steps == 5)
    assert times_of(config, five) == best_grids(errors)[5]
    assert all(setting.solver == "euler" for setting in found)


def test_a_grid_of_equal_steps_is_a_number_of_steps(make_config):
    config = make_config(depth=6)
    assert crossing(config, "euler", (0.0, 2.0, 4.0, 6.0)) == Setting("euler", 3)
    assert crossing(config, "heun", (0.0, 1.0, 6.0)) == Setting("heun", 2, grid=(0.0, 1.0, 6.0))
    for steps in (1, 2, 4, 5):
        assert crossing(config, "euler", times_of(config, Setting("euler", steps))) == Setting("euler", steps)
    # Over two groups three equal steps would straddle both blocks.
    assert crossing(make_config(depth=6, groups=2), "euler", (0.0, 1.0, 3.0, 6.0)).grid is not None

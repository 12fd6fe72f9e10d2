"""Which grid each update uses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odelm.config import Config, ModelConfig, StepSamplingConfig, TrainConfig, replace
from odelm.ode import grid
from odelm.train.draws import draw_grid
from tests.random_configs import samplings, stacks

DEPTH = 12


def config_of(groups: int = 1, seed: int = 0, **options) -> Config:
    return Config(
        model=ModelConfig(depth=DEPTH, groups=groups),
        step_sampling=StepSamplingConfig(**options),
        train=TrainConfig(seed=seed),
    ).validate()


@pytest.mark.parametrize("kind", ["fixed", "random_sizes", "random_count"])
@pytest.mark.parametrize("groups", [1, 3])
def test_grids_are_a_function_of_seed_and_update(kind, groups):
    config = config_of(groups, kind=kind, counts=(6, 12), jitter=0.5)
    grids = [draw_grid(config, update) for update in range(40)]
    for update, drawn in enumerate(grids):
        np.testing.assert_array_equal(drawn, draw_grid(config, update))
        assert drawn.dtype == np.float32 and len(drawn) - 1 in config.trained_counts
        assert drawn[0] == 0 and drawn[-1] == DEPTH and (np.diff(drawn) > 0).all()
        assert set(np.arange(groups + 1) * DEPTH / groups) <= set(drawn.tolist())
    distinct = len({drawn.tobytes() for drawn in grids})
    assert distinct == 1 if kind == "fixed" else distinct > 30


def test_fixed_is_unit_steps():
    config = config_of(kind="fixed")
    assert config.trained_counts == (DEPTH,)
    np.testing.assert_array_equal(draw_grid(config, 5), np.arange(DEPTH + 1))


def test_counts_are_drawn_by_weight_in_equal_steps():
    config = config_of(counts=(12, 3, 6), weights=(1.0, 3.0, 0.0))
    assert config.trained_counts == (3, 12), "a count that is never drawn need not be compiled"
    counts = [len(draw_grid(config, update)) - 1 for update in range(400)]
    # 400 draws at probability 3/4: five standard deviations are 0.11.
    assert set(counts) == {3, 12} and abs(counts.count(3) / 400 - 0.75) < 0.11
    coarse = next(draw_grid(config, update) for update in range(400) if counts[update] == 3)
    np.testing.assert_array_equal(coarse, [0, 4, 8, 12])


def test_another_seed_draws_other_grids():
    one, other = (config_of(seed=seed, kind="random_sizes") for seed in (0, 1))
    assert draw_grid(one, 0).tobytes() != draw_grid(other, 0).tobytes()


def test_few_steps_come_first():
    config = config_of(counts=(3, 12, 6, 4), few_first=0.25)
    updates = config.train.updates
    drawn = [len(draw_grid(config, update)) - 1 for update in range(updates)]
    assert set(drawn[: updates // 4]) == {3, 4} and set(drawn[updates // 4 :]) == {3, 4, 6, 12}


def test_fine_steps_come_last():
    config = config_of(counts=(3, 12, 6, 4), few_first=0.25, fine_last=0.5)
    updates = config.train.updates
    drawn = [len(draw_grid(config, update)) - 1 for update in range(updates)]
    assert set(drawn[: updates // 4]) == {3, 4} and set(drawn[updates // 2 :]) == {6, 12}
    assert set(drawn[updates // 4 : updates // 2]) == {3, 4, 6, 12}
    weighted = config_of(counts=(3, 12, 6), weights=(1.0, 0.0, 2.0), fine_last=0.5)
    assert {len(draw_grid(weighted, update)) - 1 for update in range(updates // 2, updates)} == {6}


def test_annealing_lets_the_largest_counts_in_first():
    config = config_of(counts=(3, 12, 6), anneal=0.5)
    config = replace(config, {"train.updates": 600})
    seen = [
        {len(draw_grid(config, update)) - 1 for update in range(start, start + 100)} for start in range(0, 600, 100)
    ]
    assert seen == [{12}, {12, 6}, {12, 6, 3}, {12, 6, 3}, {12, 6, 3}, {12, 6, 3}]
    assert config.trained_counts == (3, 6, 12)
    weighted = config_of(counts=(3, 12, 6), weights=(1.0, 0.0, 2.0), anneal=0.5)
    assert {len(draw_grid(weighted, update)) - 1 for update in range(40)} == {6}


def test_without_counts_the_depth_says_which():
    assert config_of(counts=()).trained_counts == (3, 4, 6, 12)
    assert config_of(counts=(), anneal=0.5).trained_counts == (3, 4, 5, 7, 9, 12)
    assert config_of(3, counts=(), anneal=0.5).trained_counts == (3, 6, 9, 12)


@given(st.data(), stacks(), st.integers(0, 2**31 - 1), st.integers(0, 700))
def test_every_draw_is_a_grid_of_the_core_with_a_compiled_count(data, model, seed, update):
    sampling = data.draw(samplings(model))
    config = Config(model=model, step_sampling=sampling, train=TrainConfig(seed=seed, eval_steps=(model.groups,)))
    config.validate()
    drawn = draw_grid(config, update)
    np.testing.assert_array_equal(grid.checked(drawn, model.core, model.groups), drawn)
    np.testing.assert_array_equal(draw_grid(config, update), drawn)
    counts = config.trained_counts
    assert drawn.dtype == np.float32 and len(drawn) - 1 in counts
    assert list(counts) == sorted(set(counts)) and all(count % model.groups == 0 for count in counts)

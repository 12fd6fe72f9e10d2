"""Recipes at equal time, and rates over shapes: what is chosen from their trainings, and how it is shown."""

import numpy as np
import pytest

from benchmarks.rates import line, shape
from benchmarks.variants import VARIANTS, Variant, best_of, beyond, config_of, table
from odelm.config import load_recipe, replace


def run(seed: int, factor: float, *losses: float) -> dict:
    return {"seed": seed, "factor": factor, "updates": 100, "loss": dict(zip(("12", "3"), losses, strict=False))}


def test_the_best_factor_is_that_of_the_first_seed_over_all_counts():
    runs = [run(0, 1.0, 4.0, 4.4), run(0, 2.0, 4.1, 4.2), run(0, 4.0, 3.9, 6.0), run(1, 2.0, 4.3, 4.4)]
    assert best_of(runs) == [runs[1], runs[3]]


@pytest.mark.parametrize(("best", "further"), [(0.5, 0.25), (1.0, None), (2.0, 4.0)])
def test_factors_go_on_beyond_the_last_one_that_was_best(best, further):
    assert beyond([run(0, factor, 4.0 if factor == best else 4.5) for factor in (1.0, 0.5, 2.0)]) == further


def test_a_table_has_means_and_half_ranges():
    several = [run(0, 2.0, 4.1, 4.2), run(1, 2.0, 4.3, 4.4), run(0, 1.0, 5.0, 5.0)]
    results = {"base": {"parameters": 210_000, "runs": several},
               "unshared": {"parameters": 720_000, "runs": [run(0, 1.0, 4.5)]}}  # fmt: skip
    assert table(results).splitlines()[2:] == [
        "| base | 0.21 M | 100 | 2x | 4.200 ± 0.100 | 4.300 ± 0.100 |",
        "| unshared | 0.72 M | 100 | 1x | 4.500 |  |",
    ]


def test_as_many_updates_as_fit_into_the_time():
    """Counts of 3, 4, 6 and 12 steps that take as many milliseconds, drawn as often."""
    variant = object.__new__(Variant)
    variant.config = config_of("base", load_recipe("tiny"))
    variant.fit(10.0, {(count, late): count / 1e3 for count in (3, 4, 6, 12) for late in (False, True)})
    assert variant.config.train.updates == pytest.approx(10 / np.mean([3e-3, 4e-3, 6e-3, 12e-3]), rel=0.02)
    few = object.__new__(Variant)
    few.config = config_of("muon, few first", load_recipe("tiny"))
    few.fit(10.0, {(count, late): count / 1e3 for count in (3, 4, 6, 12) for late in (False, True)})
    assert few.config.train.updates > 1.1 * variant.config.train.updates


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_recipe(name):
    config = config_of(name, load_recipe("tiny")).validate()
    assert config.model.groups == (config.model.depth if name.startswith("unshared") else 1)


def test_shapes_differ_in_size_alone_or_refer_to_one():
    base = load_recipe("tiny")
    plain = shape(base, 24, 512, None, head_size=64)
    assert (plain.model.depth, plain.model.width, plain.model.heads) == (24, 512, 8)
    given = shape(base, 24, 512, (12, 256), head_size=64)
    reference = {"model.reference_depth": 12, "model.reference_width": 256}
    assert given == replace(plain, reference)


def test_the_lowest_loss_of_a_row_is_marked():
    assert line("depth 4", [4.5, 4.25, 4.75]) == "| depth 4 | 4.500 | **4.250** | 4.750 |"

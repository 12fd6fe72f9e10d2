"""What the search of the quality dial measures, and what it chooses from that."""

import numpy as np
import pytest

from odelm.errors import InputError
from odelm.evals import row_nats, search
from odelm.evals.candidates import all_grids, crossing, full_depth
from odelm.evals.halves import Part
from odelm.evals.row_nats import Half, losses_of
from odelm.evals.search import choose, search_on
from odelm.evals.sweep import Setting
from odelm.infer.runner import Runner
from odelm.models.loss import loss_sums, mean_loss, mean_loss_of_rows

DOCUMENTS, ROWS = 20, 8


@pytest.fixture(scope="module")
def runner(make_model) -> Runner:
    return Runner.of(make_model(dtype="float32"))


@pytest.fixture(scope="module")
def half(tokens) -> Half:
    """Two batches of two rows, the last of which predicts nothing, as two documents."""
    uneven = np.array([[1, 1, 0, 0, 0, 0], [0] * 6], np.float32)
    first = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": np.ones((2, 6), np.float32)}
    batches = [first, {**first, "tokens": tokens[::-1].copy(), "weights": uneven}]
    return Half(batches, np.array([6.0, 6.0, 2.0]), Part(None, np.array([0, 1, 1]), 2))


def test_the_losses_of_rows_are_those_of_a_comparison(runner, half):
    model, grid = runner.model, (0.0, 1.0, 4.0)
    plans = {
        full_depth(model.config): model.plan(),
        Setting("heun", 2, grid=grid): model.plan(grid=grid, solver="heun"),
    }
    settings = list(plans)
    found = losses_of(runner, settings, half)
    for setting in settings:
        sums = [loss_sums(model, batch, plan=plans[setting]) for batch in half.batches]
        wanted, mean = mean_loss(sums), mean_loss_of_rows(found[setting], half.tokens)
        # float32 sums of six terms.
        assert (mean.loss, mean.stderr, mean.tokens) == pytest.approx((wanted.loss, wanted.stderr, 14), rel=1e-5)
        one, other, third = found[setting]
        np.testing.assert_allclose(half.by_unit(found[setting]), [one, other + third])
    assert not np.allclose(*found.values())


def test_one_program_serves_all_grids_of_a_number_of_steps(runner, half):
    config = runner.model.config
    settings = [crossing(config, "euler", grid) for steps in (2, 3) for grid in all_grids(4, 1, steps)]
    assert len(settings) == 6
    row_nats._row_losses.clear_cache()  # pyright: ignore
    losses_of(runner, settings, half)
    assert row_nats._row_losses._cache_size() == 2  # pyright: ignore


def test_the_search_keeps_the_best_of_each_number_of_evaluations(runner, half):
    config = runner.model.config
    nats, count = search_on(runner, half)
    # Euler's method on all grids of one to three steps, three equal ones among them, and the other methods in one step.
    assert count == 1 + 3 + 4 + 2 and full_depth(config) in nats
    every = [Setting("euler", 3), *(crossing(config, "euler", grid) for grid in all_grids(4, 1, 3))]
    best = min(losses_of(runner, every, half).items(), key=lambda item: item[1].sum())[0]
    assert best in nats and sum(setting.steps == 3 for setting in nats) == search.FINALISTS


def planted(half: np.random.Generator, increases: dict[Setting, float], *, by_document: float) -> dict:
    """Returns nats of rows, all of a document above or below the increase alike."""
    full = half.gamma(16.0, 1.0, DOCUMENTS * ROWS)
    of_document = np.repeat(half.normal(0.0, by_document, DOCUMENTS), ROWS)
    return {
        setting: full * (1 + (increase + of_document if increase else 0)) for setting, increase in increases.items()
    }


@pytest.fixture
def chosen(runner, monkeypatch):
    """Returns a function from true increases and a limit to what is chosen."""
    part = Part(None, np.repeat(np.arange(DOCUMENTS), ROWS), DOCUMENTS)
    half = Half([], np.ones(DOCUMENTS * ROWS), part)

    def run(searched: dict, unseen: dict, limit: float, *, by_document: float):
        rng = np.random.default_rng(3)
        seen = planted(rng, searched, by_document=by_document)
        nats = planted(rng, unseen, by_document=by_document)
        monkeypatch.setattr(search, "losses_of", lambda runner, settings, half: {s: nats[s] for s in settings})
        return choose(runner, seen, half, half, limit)

    return run


FULL, THREE, TWO, ONE = (Setting("euler", steps) for steps in (4, 3, 2, 1))


def test_the_cheapest_that_keeps_the_limit_on_the_other_half_is_chosen(chosen):
    increases = {FULL: 0.0, THREE: 0.001, TWO: 0.004, ONE: 0.02}
    assert chosen(increases, increases, 0.01, by_document=1e-4).chosen == TWO
    assert chosen(increases, increases, 0.03, by_document=1e-4).chosen == ONE
    none = chosen(increases, increases, 0.0005, by_document=1e-4)
    assert none.chosen is None and none.closest == THREE and none.needed == none.increases[THREE].bound > 0.0005
    assert chosen(increases, increases, none.needed, by_document=1e-4).chosen == THREE
    # It was good where it was searched only.
    assert chosen(increases, increases | {TWO: 0.02}, 0.01, by_document=1e-4).chosen == THREE
    # Nothing counts after a failure, and the other half does not reorder what the search has found.
    assert chosen(increases, increases | {THREE: 0.02}, 0.01, by_document=1e-4).chosen is None


def test_documents_that_differ_leave_a_doubt_that_their_rows_do_not_show(chosen):
    """With 20 documents that differ by 2 % of the loss the bound is 0.8 % above the value; 160 rows would say 0.3 %."""
    increases = {FULL: 0.0, THREE: 0.001, TWO: 0.004, ONE: 0.02}
    choice = chosen(increases, increases, 0.01, by_document=0.02)
    spread = choice.increases[TWO].bound - choice.increases[TWO].value
    assert 0.005 < spread < 0.011


def test_a_full_depth_that_is_not_finite_is_refused(chosen):
    increases = {FULL: np.inf, TWO: 0.004}
    with pytest.raises(InputError, match="full depth is not finite"):
        chosen(increases, increases, 0.01, by_document=1e-4)


def test_what_is_not_finite_is_never_chosen(chosen):
    other = Setting("euler", 2, grid=(0.0, 1.0, 4.0))
    increases = {FULL: 0.0, THREE: np.nan, other: np.nan, TWO: 0.004, ONE: np.inf}
    assert chosen(increases, increases, 0.01, by_document=1e-4).chosen == TWO
    assert chosen(increases, {**increases, TWO: np.nan}, 0.01, by_document=1e-4).chosen is None

"""`benchmarks.study`: how a row's rates are tuned, and which files are read again."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import study, study_report
from odelm.errors import Diverged, InputError, RunFailure

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """Returns what makes the trials of a row, given the loss of each factor, and returns the factors in their order."""

    def tune(losses: dict[float, float], rates: list[float], row: str = "random"):
        factors = []

        def train(config, workdir):
            factors.append(config.optimizer.learning_rate / 4e-3)
            if factors[-1] not in losses:
                raise Diverged("10 updates in a row were not finite")
            return SimpleNamespace(interrupted=False, losses=dict.fromkeys((3, 4, 6, 12), losses[factors[-1]]))

        monkeypatch.setattr(study, "train", train)
        options = argparse.Namespace(
            out=tmp_path, work=tmp_path, rates=rates, rate=None, trial=100, shape="study", source="texts", data_dir=""
        )
        return study.tuned_rate(row, options), factors

    return tune


def test_the_best_rate_has_a_worse_one_on_either_side(tried):
    (rate, losses), factors = tried({0.5: 4.0, 1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: 1.5}, [0.5, 1.0, 2.0])
    assert rate == 4 and factors == [0.5, 1, 2, 4, 8] and losses["8"] == 1.5
    (rate, _), factors = tried({}, [0.5])  # what was tried is not tried again
    assert rate == 4 and not factors


def test_a_call_that_was_stopped_after_the_given_rates_goes_past_them(tried, tmp_path):
    (tmp_path / "random_rates_100.json").write_text('{"0.5": 4.0, "1": 3.0, "2": 2.0}')
    (rate, _), factors = tried({4.0: 1.0, 8.0: 1.5}, [0.5, 1.0, 2.0])
    assert rate == 4 and factors == [4, 8]


def test_a_rate_that_is_given_is_not_tried(tmp_path):
    assert study.tuned_rate("random", argparse.Namespace(rate=2.0, out=tmp_path)) == (2, {})
    assert not list(tmp_path.iterdir())


def test_a_rate_that_diverges_is_none(tried, tmp_path):
    (rate, losses), factors = tried({0.5: 3.0, 1.0: 2.0}, [1.0, 2.0])
    assert rate == 1 and factors == [1, 2, 0.5] and losses["2"] is None
    assert json.loads((tmp_path / "random_rates_100.json").read_text()) == losses
    with pytest.raises(RunFailure, match="every trial diverged, at the factors 1: give lower --rates"):
        tried({}, [1.0], row="fixed")


def test_seeds_of_one_row_have_one_rate(tmp_path):
    (tmp_path / "random_0.json").write_text('{"rate": 2.0}')
    options = argparse.Namespace(out=tmp_path, seeds=3)
    study.check_rate("random", 2.0, options)
    with pytest.raises(InputError, match="random_0.json has the factor 2, not 4: .* or --rate=2"):
        study.check_rate("random", 4.0, options)


def test_a_row_that_is_another_for_longer_has_its_rates(tried, tmp_path):
    tried({1.0: 3.0, 2.0: 4.0, 0.5: 4.0}, [0.5, 1.0, 2.0], row="best_twice")
    assert [file.name for file in tmp_path.iterdir()] == ["best_rates_100.json"]


def test_the_document_has_what_was_measured():
    runs, document = study_report.read(DOCS / "study"), (DOCS / "study.md").read_text()
    for line in study_report.losses_table(runs)[2:]:
        row, _, _, *losses = [cell.strip() for cell in line.strip("|").split("|")]
        assert f"| `{row}` | {' | '.join(losses)} |" in document
    for task in (task for records in runs.values() for task in records[0]["tasks"] if task["metric"] == "acc"):
        hellaswag = task["task"] == "hellaswag"  # by length in the document
        assert hellaswag or f"{100 * task['value']:.1f}" in document


def test_the_report_has_the_tasks_and_draws_the_curves(tmp_path):
    runs = study_report.read(DOCS / "study")
    lines = study_report.tasks_table(runs)
    assert "| blimp | acc | unshared | 71.1 ± 0.2 % |  |  |  | 50.0% |" in lines
    study_report.plot(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_time_is_a_share_of_the_row_that_was_measured_beside_it():
    def measured(loss: float, ms: float, **more):
        evaluations = [{"evaluations": 12, "loss": loss, "latency_ms": {"median": ms}}]
        return [{"parameters": 1e6, "rate": 2.0, "evaluations": evaluations} | more]

    runs = {"unshared": measured(3.0, 5.0), "other": measured(3.1, 4.0), "fixed": measured(3.5, 3.0, against="other")}
    cells = [line.split(" | ")[-1] for line in study_report.losses_table(runs)[2:]]
    assert cells == ["3.000 (1.00) |", "3.100 (0.80) |", "3.500 (0.75) |"]
    assert "3.500 (0.60)" in study_report.losses_table(runs, "unshared")[-1], "unless another is asked for"


def test_the_trials_of_a_row_are_not_read_as_its_results(tmp_path):
    (tmp_path / "groups_2_rates_100.json").write_text('{"1": 3.0}')
    (tmp_path / "groups_2_0.json").write_text('{"row": "groups_2"}')
    assert study_report.read(tmp_path) == {"groups_2": [{"row": "groups_2"}]}

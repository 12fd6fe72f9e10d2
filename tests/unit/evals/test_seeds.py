"""Mean and spread over seeds, from what each run recorded."""

import json
import math

import numpy as np
import pytest
from rich.console import Console

from odelm.config import Config, DataConfig, ModelConfig
from odelm.errors import InputError
from odelm.evals.seeds import last_evaluation, make_rows, print_seeds, report_seeds, seed_folder, seeds_in
from odelm.run_directory import save_config

KEYS = {"task", "metric", "steps", "evaluations", "mean", "std", "seeds", "values", "n", "majority"}
CONFIG = Config(
    model=ModelConfig(kind="encoder", depth=6, prelude=1, coda=1, outputs=2),
    data=DataConfig(task="mrpc", source="glue"),
)


def record(step: int, *accuracies: float) -> dict:
    scores = {steps: {"accuracy": value, "f1": value / 2} for steps, value in zip(("4", "2"), accuracies, strict=True)}
    losses = {steps: 1 - found["accuracy"] for steps, found in scores.items()}
    majority = {"accuracy": 0.6, "f1": 0.75}
    return {"step": step, "eval_loss": losses, "eval_tokens": 408, "eval_metrics": scores, "eval_majority": majority}


@pytest.fixture
def runs(tmp_path):
    """Returns a folder of three seeds, whose last evaluations count."""
    for seed, values in {3: (0.5, 0.25), 4: (0.75, 0.5), 10: (1.0, 0.75)}.items():
        folder = seed_folder(tmp_path, seed)
        folder.mkdir()
        save_config(folder, CONFIG)
        lines = [{"step": 1, "loss": 1.0}, record(2, 0.0, 0.0), record(4, *values), {"step": 4, "loss": 0.5}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_row_for_each_metric_and_step_count(runs):
    assert seeds_in(runs) == [3, 4, 10]
    rows = make_rows(CONFIG, [3, 4, 10], [last_evaluation(seed_folder(runs, seed)) for seed in (3, 4, 10)])
    assert all(row.keys() == KEYS for row in rows)
    named = {(row["metric"], row["steps"]): row for row in rows}
    assert list(named) == [(name, steps) for name in ("accuracy", "f1", "loss") for steps in (4, 2)]
    row = named["accuracy", 2]
    assert (row["mean"], row["std"], row["values"]) == (0.5, 0.25, [0.25, 0.5, 0.75])
    assert (row["evaluations"], row["seeds"], row["n"], row["majority"]) == (4, [3, 4, 10], 408, 0.6)
    assert named["f1", 4]["mean"] == 0.375 and named["f1", 4]["majority"] == 0.75
    assert named["loss", 4]["majority"] is None and named["loss", 4]["mean"] == 0.25


def test_seeds_of_other_numbers_of_updates_are_refused():
    message = "seed 1 was evaluated after 4 updates, seed 0 after 2: .* --config.train.updates=4"
    with pytest.raises(InputError, match=message):
        make_rows(CONFIG, [0, 1], [record(2, 0.5, 0.5), record(4, 0.5, 0.5)])


def test_one_seed_has_no_spread_and_a_loss_that_is_not_finite_no_mean():
    rows = make_rows(CONFIG, [0], [record(1, 0.5, 0.5)])
    assert all(math.isnan(row["std"]) for row in rows)
    broken = record(1, 0.5, 0.5) | {"eval_loss": {"4": None, "2": 0.1}}
    rows = make_rows(CONFIG, [0, 1], [record(1, 0.5, 0.5), broken])
    assert np.isnan([row["mean"] for row in rows if row["metric"] == "loss"]).tolist() == [True, False]


def test_the_report_is_written_and_printed(runs, capsys):
    assert report_seeds(runs, [3, 4]) == runs
    results = json.loads((runs / "results.json").read_text())
    assert results["task"] == "mrpc" and len(results["rows"]) == 6
    assert (runs / "results.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for words in ("62.5 ± 17.7", "37.5 ± 17.7", "60.0", "408", "over 2 seeds (3, 4)", "4 steps", "2 steps"):
        assert words in shown, words
    report_seeds(runs, [10])
    assert json.loads((runs / "results.json").read_text())["rows"][0]["std"] is None
    assert "±" not in capsys.readouterr().out.splitlines()[4]


def test_a_text_has_its_loss_only(capsys):
    text = {"step": 1, "eval_loss": {"12": 4.0}, "eval_tokens": 100}
    rows = make_rows(Config(), [0, 1], [text, text | {"eval_loss": {"12": 5.0}}])
    assert [(row["task"], row["metric"], row["mean"]) for row in rows] == [("python_source", "loss", 4.5)]
    print_seeds({"task": "text", "updates": 1, "sampling": "fixed", "rows": rows}, Console(width=80))
    assert "4.5000 ± 0.7071" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match="seed 1 evaluated other step counts than seed 0"):
        make_rows(CONFIG, [0, 1], [record(1, 0.5, 0.5), record(1, 0.5, 0.5) | {"eval_loss": {"4": 0.1}}])
    (seed_folder(runs, 4) / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(InputError, match="seed-4 has recorded no evaluation"):
        report_seeds(runs, [3, 4])

"""`benchmarks.study`: how a row's rates are tuned, and which files are read again."""

import argparse
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from benchmarks import study, study_measures, study_report, study_times, trained_field
from benchmarks.study_rows import base
from odelm.config import to_json
from odelm.errors import Diverged, InputError, RunFailure
from odelm.models.loss import inputs_of
from odelm.train.draws import draw_grid

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


def made(row: str, options: argparse.Namespace, **changed: Any) -> str:
    """Returns the file of a seed that was trained."""
    config = study.config_of(row, options, rate=2.0, seed=0, updates=options.updates)
    return json.dumps({"rate": 2.0, "tasks": [], "config": json.loads(to_json(config))} | changed)


def options_of(folder: Path, **changed: Any) -> argparse.Namespace:
    given = dict(out=folder, work=folder / "work", rate=2.0, seeds=2, updates=1400, data=folder, tasks=[])
    return argparse.Namespace(**given | dict(shape="study", source="texts", data_dir="") | changed)


def test_seeds_of_one_row_are_trained_alike(tmp_path):
    options = options_of(tmp_path, seeds=3)
    (tmp_path / "random_0.json").write_text(made("random", options))
    study.check_made("random", 2.0, options)
    study.check_made("random", None, options)
    with pytest.raises(InputError, match="random_0.json has the factor 2, not 4: .* or --rate=2"):
        study.check_made("random", 4.0, options)
    with pytest.raises(
        InputError, match=r"random_0.json was trained otherwise \(.*train.updates: 1400 -> 700.*\): remove it"
    ):
        study.check_made("random", 2.0, options_of(tmp_path, updates=700))
    (tmp_path / "fixed_0.json").write_text(made("random", options))
    with pytest.raises(InputError, match=r"fixed_0.json was .* \(step_sampling.kind: 'random_count' -> 'fixed'\)"):
        study.check_made("fixed", None, options)


def test_files_elsewhere_are_the_same_files(tmp_path):
    elsewhere = options_of(tmp_path, work=Path("elsewhere"), source="elsewhere", data_dir="elsewhere")
    (tmp_path / "taught_0.json").write_text(made("taught", elsewhere))
    study.check_made("taught", 2.0, options_of(tmp_path))


@pytest.mark.parametrize(
    ("row", "updates"), [("random", 1400), ("taught", 1400), ("encoder_best", 1000), ("large_best", 700)]
)
def test_the_rows_of_the_document_are_those_of_its_commands(row, updates):
    assert (DOCS / "study" / f"{row}_0.json").exists()
    study.check_made(row, 2.0, options_of(DOCS / "study", updates=updates))


def test_a_row_with_all_its_files_is_checked_and_told(tmp_path, capsys):
    options = options_of(tmp_path, seeds=1)
    (tmp_path / "random_0.json").write_text(made("random", options))
    study.make_files("random", options)
    assert f"random: random_0.json in {tmp_path} already" in capsys.readouterr().out
    with pytest.raises(InputError, match="has the factor 2, not 4"):
        study.make_files("random", options_of(tmp_path, seeds=1, rate=4.0))


def test_a_row_that_is_another_for_longer_has_its_rates(tried, tmp_path):
    tried({1.0: 3.0, 2.0: 4.0, 0.5: 4.0}, [0.5, 1.0, 2.0], row="best_twice")
    assert [file.name for file in tmp_path.iterdir()] == ["best_rates_100.json"]


def test_nothing_is_trained_again_if_a_call_is_stopped_during_scoring(monkeypatch, tmp_path, capsys):
    trained = []

    def run_row(row, seed, *_):
        trained.append(seed)
        (tmp_path / "work" / f"{row}_{seed}").mkdir(parents=True)
        config = study.config_of(row, options, rate=2.0, seed=seed, updates=options.updates)
        return {"row": row, "rate": 2.0, "curve": [seed], "tasks": [], "config": json.loads(to_json(config))}

    def stopped(*_):
        raise KeyboardInterrupt

    options = options_of(tmp_path, tasks=["lambada"])
    monkeypatch.setattr(study, "run_row", run_row)
    monkeypatch.setattr(study, "scored", stopped)
    with pytest.raises(KeyboardInterrupt):
        study.make_files("random", options)
    monkeypatch.setattr(study, "scored", lambda *_: ["the scores"])
    study.make_files("random", options)
    assert trained == [0, 1]
    assert json.loads((tmp_path / "random_0.json").read_text())["tasks"] == ["the scores"]
    assert json.loads((tmp_path / "random_1.json").read_text())["tasks"] == []
    (tmp_path / "random_0.json").write_text(made("random", options))
    (tmp_path / "work" / "random_0").rmdir()
    study.make_files("random", options)
    assert "random_0.json has no scores, and the run" in capsys.readouterr().out


def test_an_encoder_that_has_no_task_to_score_is_told(monkeypatch, tmp_path, capsys):
    options = options_of(tmp_path, tasks=["lambada"])
    (tmp_path / "encoder_random_0.json").write_text(made("encoder_random", options))
    (tmp_path / "work" / "encoder_random_0").mkdir(parents=True)
    monkeypatch.setattr(study, "scored", lambda *_: [])
    study.add_scores("encoder_random", options)
    assert "encoder_random: encoders score sentence pairs alone" in capsys.readouterr().out


def test_the_document_has_what_was_measured():
    folder, document = DOCS / "study", (DOCS / "study.md").read_text()
    runs, times = study_report.read(folder), study_report.read_times(folder)
    for line in study_report.losses_table(runs, times)[2:]:
        row, *losses = [cell.strip() for cell in line.strip("|").split("|")]
        assert f"| `{row}` | {' | '.join(losses)} |" in document
    for line in study_report.sizes_table(runs, study_report.with_seconds(runs, times))[2:]:
        row, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert f"| `{row}` | {' | '.join(cells)} |" in document
    for task in (task for records in runs.values() for task in records[0]["tasks"]):
        if task["metric"] == ("acc_norm" if task["task"] == "hellaswag" else "acc"):
            assert f"{100 * task['value']:.1f} |" in document


def test_the_report_has_the_tasks_and_draws_the_curves(tmp_path):
    runs = study_report.read(DOCS / "study")
    lines = study_report.tasks_table(runs)
    assert "| blimp | acc | unshared | 71.1 ± 0.2 % |  |  |  | 50.0% |" in lines
    timed = study_report.with_seconds(runs, study_report.read_times(DOCS / "study"))
    study_report.plot(timed, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_decoders_and_encoders_are_not_compared():
    runs = study_report.read(DOCS / "study")
    decoders, encoders = study_report.by_kind(runs)
    assert {"unshared", "groups_3_few"} < decoders.keys() and {"encoder_best", "encoder_post_random"} < encoders.keys()
    assert decoders.keys() | encoders.keys() == runs.keys()
    assert study_report.by_kind({}) == []


def test_a_plot_of_all_rows_has_room_for_its_curves(tmp_path, recwarn):
    timed = study_report.with_seconds(study_report.read(DOCS / "study"), study_report.read_times(DOCS / "study"))
    study_report.plot(timed, tmp_path / "curves.png")
    assert not [str(warning.message) for warning in recwarn]


def test_the_report_has_what_encoders_reached_on_glue(tmp_path):
    def scored(metric: str, evaluations: int, mean: float):
        given = {"steps": evaluations // 2, "std": 0.012, "majority": 0.5 if metric == "accuracy" else None}
        return {"metric": metric, "evaluations": evaluations, "mean": mean} | given

    assert study_report.glue_table(tmp_path) == []
    rows = [scored("accuracy", 12, 0.8), scored("accuracy", 4, 0.75), scored("loss", 12, 0.4)]
    (tmp_path / "glue_encoder_best.json").write_text(json.dumps({"rte": {"rows": rows}}))
    one_seed = scored("pearson", 12, 0.3) | {"std": None}
    alone = {"rte": {"rows": rows[:1]}, "stsb": {"rows": [one_seed]}}
    (tmp_path / "glue_encoder_unshared.json").write_text(json.dumps(alone))
    assert study_report.glue_table(tmp_path) == [
        "| task | metric | row | 12 | 4 | majority |",
        "|---|---|---|---|---|---|",
        "| rte | accuracy | encoder_best | 80.0 ± 1.2 | 75.0 ± 1.2 | 50.0 |",
        "| rte | accuracy | encoder_unshared | 80.0 ± 1.2 |  | 50.0 |",
        "| stsb | pearson | encoder_unshared | 30.0 |  |  |",
    ]


def test_a_time_is_a_share_of_the_row_that_is_compared():
    def measured(loss: float):
        return [{"evaluations": [{"evaluations": 12, "steps": 10, "loss": loss}]}]

    runs = {"unshared": measured(3.0), "other": measured(3.1), "untimed": measured(3.5)}
    times = {"unshared": {"pass_s": {"10": 0.005}}, "other": {"pass_s": {"10": 0.004}}}
    cells = [line.split(" | ")[-1] for line in study_report.losses_table(runs, times)[2:]]
    assert cells == ["3.000 (1.00) |", "3.100 (0.80) |", "3.500 |"]
    assert "3.000 (1.25)" in study_report.losses_table(runs, times, "other")[2]


def test_times_of_another_card_are_not_written_over(tmp_path):
    file = tmp_path / study_times.TIMES
    fresh = study_times.former(file)
    assert fresh["rows"] == {}
    file.write_text(json.dumps(fresh | {"rows": {"random": {}}}))
    assert list(study_times.former(file)["rows"]) == ["random"]
    file.write_text(json.dumps(fresh | {"device": "NVIDIA H200"}))
    with pytest.raises(InputError, match=r"times.json is of NVIDIA H200 and jax .*, not of cpu .*: move it away"):
        study_times.former(file)


def test_a_field_is_refined_by_one_program_for_all_counts(make_model, tokens):
    model = make_model(kind="decoder", depth=4)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(tokens.shape, np.float32)}
    found = trained_field._refined(model, batch)
    exact = model.encode(tokens, plan=model.plan(steps=32, solver="heun"))
    for solver, distances in found["distances"].items():
        assert list(distances) == ["1", "2", "4", "8", "16"]
        for count, distance in distances.items():
            end = model.encode(tokens, plan=model.plan(steps=int(count), solver=solver))
            np.testing.assert_allclose(distance, jnp.linalg.norm(end - exact) / jnp.linalg.norm(exact), rtol=1e-3)
    graph, params = nnx.split(model)
    h, slopes = model.embed(inputs_of(batch)), []
    for t in range(4):
        after = model.blocks[0](h, jnp.float32(t))
        slopes.append(after - h)
        h = after
    changes = [jnp.linalg.norm(b - a) / jnp.linalg.norm(b) for a, b in itertools.pairwise(slopes)]
    np.testing.assert_allclose(trained_field._second_differences(graph, params, batch), changes, rtol=1e-4)


def test_a_row_that_was_timed_by_itself_has_a_share_of_the_row_beside_it():
    def measured(ms: float, **more):
        return [{"evaluations": [{"evaluations": 12, "steps": 12, "loss": 3.0, "latency_ms": {"median": ms}}]} | more]

    runs = {"unshared": measured(5.0), "other": measured(4.0), "fixed": measured(3.0, against="other")}
    cells = [line.split(" | ")[-1] for line in study_report.losses_table(runs, {})[2:]]
    assert cells == ["3.000 (1.00) |", "3.000 (0.80) |", "3.000 (0.75) |"]
    lines = study_report.losses_table(runs, {"other": {"pass_s": {"12": 0.004}}}, "other")[2:]
    assert [line.split(" | ")[-1] for line in lines] == ["3.000 |", "3.000 (1.00) |", "3.000 |"], "of one day only"


def test_the_seconds_of_a_training_are_those_of_the_counts_that_it_drew():
    config = base("texts", 40)
    drawn = [len(draw_grid(config, update)) - 1 for update in range(30)]
    assert len(set(drawn)) == 4
    record = {"config": json.loads(to_json(config)), "curve": [{"update": 30, "losses": {}}]}
    times = {"random": {"update_s": {"12": 1000.0, "6": 100.0, "4": 10.0, "3": 1.0}}}
    timed = study_report.with_seconds({"random": [record], "untimed": [record]}, times)
    expected = sum({12: 1000, 6: 100, 4: 10, 3: 1}[count] for count in drawn)
    assert list(timed) == ["random"] and timed["random"][0]["curve"][0]["seconds"] == expected


def test_losses_of_all_counts_are_those_of_their_passes(make_model, tokens):
    model = make_model(kind="decoder", depth=4)
    weights = np.ones(tokens.shape, np.float32)
    batch = {"tokens": tokens, "targets": tokens[:, ::-1], "weights": weights}
    for one in (model, odelm.quantize(model, "int8")):
        for n, (evaluations, found) in zip((4, 2), study_measures.losses_of(one, (4, 2), [batch]), strict=True):
            logits = jax.nn.log_softmax(one(tokens, steps=n))
            expected = -jnp.take_along_axis(logits, batch["targets"][..., None], 2).mean()
            assert evaluations == n
            np.testing.assert_allclose(found.loss, expected, rtol=1e-5)


def test_losses_with_matrices_of_8_bits_are_beside_the_others():
    measured = [{"evaluations": n, "loss": 2.0, "quantized": {"int8": 2.0 + 0.01 * n}} for n in (12, 3)]
    runs = {"best": [{"evaluations": measured}], "fixed": [{"evaluations": [{"evaluations": 12, "loss": 3.0}]}]}
    assert study_report.quantized_table(runs)[2:] == ["| best | int8 | 2.120 (+6.00) | 2.030 (+1.50) |"]
    assert study_report.quantized_table({"fixed": runs["fixed"]}) == []


def test_losses_without_text_are_an_error(monkeypatch, make_model, tmp_path):
    config = base("gone.txt", 10)
    monkeypatch.setattr(study_measures.odelm, "load", lambda workdir, step: (make_model(), config))
    monkeypatch.setattr(study_measures, "batches_of", lambda *given, **options: (None, []))
    with pytest.raises(InputError, match="no held-out text to be measured on: restore 'gone.txt'"):
        study_measures.measured(tmp_path, config, 10)


def test_jumps_and_skipped_updates_of_a_run_are_counted():
    def record(loss: float, **more):
        return {"tokens_per_s": 1.0, "tokens": 10, "step": 1, "loss": loss, "gradient_norm": 1.0} | more

    records = [record(3.0, gradient_norm=9.0), *[record(3.0) for _ in range(12)], record(3.5, gradient_norm=4.0)]
    records += [{"step": 2, "eval_loss": {"12": 3.2}}, record(3.0, skipped=2), record(3.0, gradient_norm=None)]
    found = study_measures.stability_of(records)
    assert found == {"skipped": 2, "jumps": 1, "largest_gradient_norm": 4.0}
    runs = {"best": [{"stability": found}, {"stability": found | {"skipped": 3}}], "old": [{}]}
    assert study_report.stability_table(runs)[2:] == ["| best | 3 | 1 | 4.00 |"]
    alone = {"best": [{"stability": found | {"largest_gradient_norm": None}}]}
    assert study_report.stability_table(alone)[2:] == ["| best | 2 | 1 |  |"]
    assert study_report.stability_table({"old": [{}]}) == []


def test_a_row_that_is_another_for_longer_has_its_times(tmp_path):
    (tmp_path / study_times.TIMES).write_text('{"rows": {"unshared": {"pass_s": {"12": 0.005}}}}')
    assert study_report.read_times(tmp_path) == dict.fromkeys(("unshared", "unshared_half"), {"pass_s": {"12": 0.005}})
    (tmp_path / study_times.TIMES).write_text('{"rows": {"unshared": {}, "unshared_half": {"pass_s": {}}}}')
    assert study_report.read_times(tmp_path)["unshared_half"] == {"pass_s": {}}
    (tmp_path / study_times.TIMES).write_text(json.dumps({"rows": {"encoder_random": {}}}))
    assert list(study_report.read_times(tmp_path)) == ["encoder_random"], "encoder_best has its rate, not its times"


def test_the_trials_of_a_row_are_not_read_as_its_results(tmp_path):
    (tmp_path / "groups_2_rates_100.json").write_text('{"1": 3.0}')
    (tmp_path / "groups_2_0.json").write_text('{"row": "groups_2"}')
    assert study_report.read(tmp_path) == {"groups_2": [{"row": "groups_2"}]}

"""An interrupted run, started again, ends where the uninterrupted one does, to the bit."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import odelm
from odelm.checkpoint import Checkpoints
from odelm.config import replace
from odelm.data.loader import held_out_rows
from odelm.data.prepare import prepare
from odelm.errors import InputError, RunFailure
from odelm.models.loss import loss_sums, mean_loss
from odelm.run_directory import read_config
from odelm.train import log, prefetch
from odelm.train.run import train

pytestmark = pytest.mark.usefixtures("traced_once")
UPDATES, STOP = 8, 5


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory) -> odelm.Config:
    return odelm.Config(
        model=odelm.ModelConfig(vocab_size=300, width=32, heads=2, depth=4, max_length=32, dropout=0.1),
        data=odelm.DataConfig(
            corpus="text", source=str(corpus), data_dir=str(tmp_path_factory.mktemp("data")), valid_fraction=0.1
        ),
        step_sampling=odelm.StepSamplingConfig(counts=(2, 4)),
        train=odelm.TrainConfig(
            updates=UPDATES, batch_size=4, length=16, eval_batches=2, checkpoint_every=4, log_every=1, unroll=False
        ),
    )


@pytest.fixture(scope="module")
def finished(config, once) -> Path:
    """Returns a run of all the updates, which no test may change."""

    def fill(workdir: Path) -> None:
        done = train(config, workdir)
        assert done.step == UPDATES and not done.interrupted

    return once("resume", fill)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Returns a copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def params_of(workdir: Path) -> list[np.ndarray]:
    from flax import nnx

    model, _, _ = odelm.load(workdir)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def logged(workdir: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def evaluated(workdir: Path) -> dict[int, float]:
    """Returns the last recorded held-out losses by step count."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["eval_loss"] for record in records if "eval_loss" in record][-1]
    return {int(steps): loss for steps, loss in losses.items()}


def evaluations(workdir: Path) -> list[tuple[int, dict[str, float]]]:
    records = [json.loads(line) for line in (workdir / log.METRICS).read_text().splitlines()]
    return [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]


def with_train(config: odelm.Config, **options) -> odelm.Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **options))


@pytest.mark.thorough
def test_a_run_that_is_watched_records_more(config, corpus, tmp_path, capsys):
    """Each evaluation has norms for every unit of depth, a loss for every component, and a figure."""
    text = next(corpus.rglob("*.txt")).read_text()
    for component in ("a", "b"):
        for i in range(20):
            path = tmp_path / "texts" / component / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{component * 3} {text[20 * i : 20 * i + 400]}")
    config = replace(config, {"data.source": str(tmp_path / "texts"), "data.valid_fraction": 0.3})
    config = with_train(config, updates=2, eval_every=1, eval_batches=0, watch=True)
    train(config, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / log.METRICS).read_text().splitlines()]
    found = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in found] == [1, 2]
    for record in found:
        assert len(record["state_norms"]) == len(record["field_norms"]) == 4 and min(record["field_norms"]) > 0
        assert record["eval_loss_by_component"].keys() == {"a", "b"}
        low, high = sorted(record["eval_loss_by_component"].values())
        assert low < record["eval_loss"]["4"] < high
    events = next((tmp_path / "run" / "tensorboard").iterdir()).read_bytes()
    assert events.count(b"eval/loss_over_steps") == 2 and b"depth/field_norm_03" in events
    told = capsys.readouterr().out
    assert "held-out loss at full depth  a " in told and "2 updates in " in told and "0 updates skipped" in told


def test_interrupted_run_resumes_to_the_bit(config, finished, traced_anew, tmp_path, monkeypatch):
    original = log.Log.training

    def interrupt_after_stop(self, step, metrics):
        original(self, step, metrics)
        if step == STOP:
            os.kill(os.getpid(), signal.SIGINT)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "training", interrupt_after_stop)
        stopped = train(config, tmp_path / "stopped")
    assert stopped.interrupted and stopped.step == STOP
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert len(params_of(tmp_path / "stopped")) > 0

    resumed = train(config, tmp_path / "stopped")
    assert resumed.step == UPDATES and resumed.losses == evaluated(finished)
    assert logged(tmp_path / "stopped") == logged(finished)
    for left, right in zip(params_of(finished), params_of(tmp_path / "stopped"), strict=True):
        np.testing.assert_array_equal(left, right)


OPTIMIZERS = {
    "muon": dict(kind="muon"),
    "average": dict(average=0.9),
    "muon, stable": dict(kind="muon", decay="stable"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_resumes_to_the_bit(config, tmp_path, options):
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **options))
    config = with_train(config, accumulate=2)
    whole = train(config, tmp_path / "whole")
    parted = tmp_path / "parted"
    train(config, parted)
    shutil.rmtree(parted / "checkpoints" / str(UPDATES))
    resumed = train(config, parted)
    assert resumed.losses == whole.losses and resumed.step == UPDATES
    for left, right in zip(params_of(tmp_path / "whole"), params_of(parted), strict=True):
        np.testing.assert_array_equal(left, right)
    # What is loaded is what was evaluated.
    model, loaded, _ = odelm.load(parted)
    held_out = held_out_rows(prepare(loaded), loaded, limit=8).batches(4)
    assert mean_loss([loss_sums(model, rows) for rows in held_out]).loss == pytest.approx(whole.losses[4], rel=1e-5)


def test_an_evaluation_that_a_stop_leaves_out_is_made_when_the_run_is_resumed(config, tmp_path, monkeypatch):
    config = with_train(config, eval_every=STOP)
    train(config, tmp_path / "whole")
    original = log.Log.training

    def interrupt_at_stop(self, step, metrics):
        original(self, step, metrics)
        if step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "training", interrupt_at_stop)
        assert train(config, tmp_path / "stopped").signal == signal.SIGTERM
    assert "eval_loss" not in (tmp_path / "stopped" / log.METRICS).read_text()
    train(config, tmp_path / "stopped")
    whole, stopped = (evaluations(tmp_path / name) for name in ("whole", "stopped"))
    assert [step for step, _ in whole] == [STOP, UPDATES] and stopped == whole


def test_records_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / log.METRICS
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    with log.Log(tmp_path, updates=9, start=1) as writer:
        writer.training(2, {"loss": 1.4, "tokens_per_s": 1.0})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [2.0, 1.4]


def test_without_a_terminal_every_record_is_a_line(tmp_path, capsys):
    with log.Log(tmp_path, updates=9, start=0) as writer:
        writer.training(1, {"loss": 1.5, "tokens_per_s": 2345.0})
        writer.training(2, {"loss": 1.25, "tokens_per_s": 1.0})
    assert capsys.readouterr().out == ("update 1/9: loss 1.5000, 2,345 tokens/s\nupdate 2/9: loss 1.2500, 1 tokens/s\n")


def test_a_terminal_has_a_bar_in_place_of_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    with log.Log(tmp_path, updates=9, start=0) as writer:
        writer.training(2, {"loss": 1.25, "tokens_per_s": 1.0})
    shown = capsys.readouterr().out
    assert "2/9" in shown and "loss 1.250" in shown and "update 2" not in shown


def test_a_run_that_diverges_stops_and_keeps_its_good_checkpoints(config, tmp_path):
    train(with_train(config, updates=2), tmp_path)
    good = params_of(tmp_path)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e38)
    wild = with_train(dataclasses.replace(config, optimizer=optimizer), updates=6, checkpoint_every=1, log_every=1)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["optimizer"]["learning_rate"] = 1e38
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(RunFailure, match="non-finite in 3 updates in a row.*newest good checkpoint is 2\\."):
        train(with_train(wild, max_nonfinite=3), tmp_path)
    assert "NaN" not in (tmp_path / log.METRICS).read_text() and "Infinity" not in (tmp_path / log.METRICS).read_text()
    for before, after in zip(good, params_of(tmp_path), strict=True):
        np.testing.assert_array_equal(before, after)
    records = [json.loads(line) for line in (tmp_path / log.METRICS).read_text().splitlines()]
    assert [record.get("skipped") for record in records][-2:] == [1, 1]


def test_single_updates_that_are_not_finite_are_skipped(config, tmp_path, monkeypatch):
    """A token that is out of the vocabulary makes its batch's loss NaN."""
    original = prefetch.Prefetch.next

    def poisoned(self):
        batch = original(self)
        self.number = getattr(self, "number", 0) + 1
        return dict(batch) | {"tokens": batch["tokens"] + 999} if self.number in (3, 4) else batch

    monkeypatch.setattr(prefetch.Prefetch, "next", poisoned)
    config = with_train(config, max_nonfinite=3, log_every=4, checkpoint_every=3)
    assert train(config, tmp_path).step == UPDATES
    records = [json.loads(line) for line in (tmp_path / log.METRICS).read_text().splitlines()]
    assert [(r["step"], r.get("skipped"), r["gradient_norm"] is None) for r in records if "loss" in r] == [
        (4, 2, True), (8, None, False),
    ]  # fmt: skip
    assert all(r["loss"] > 0 for r in records if "loss" in r)
    # Nothing is saved while updates are being skipped, as the third is.
    assert Checkpoints(tmp_path, read_only=True).steps() == [6, 8]
    assert all(np.isfinite(leaf).all() for leaf in params_of(tmp_path))


def test_damaged_metrics_cost_the_damaged_lines(config, finished, run):
    lines = (finished / log.METRICS).read_bytes().split(b"\n")
    damaged = [lines[0], b"\xff\xfe\x00", b"[1, 2]", b"3", b'{"step": "x"}', b'{"step": 2', *lines[2:]]
    (run / log.METRICS).write_bytes(b"\n".join(damaged))
    train(with_train(config, updates=UPDATES + 1), run)
    kept = (run / log.METRICS).read_bytes().split(b"\n")
    assert kept[: len(lines) - 2] == [lines[0], *lines[2:-1]] and len(kept) == len(lines) + 1


@pytest.mark.parametrize("name", [log.METRICS, log.TENSORBOARD])
def test_metrics_that_cannot_be_opened_end_the_run_in_a_line(config, run, name):
    taken = run / name
    shutil.rmtree(taken) if taken.is_dir() else taken.unlink()
    taken.mkdir() if name == log.METRICS else taken.touch()
    with pytest.raises(RunFailure, match=f"the metrics in {run} cannot be written .*{taken}"):
        train(config, run)


def test_a_record_without_its_losses_is_made_again(config, run):
    (run / log.METRICS).write_text(f'{{"step": {UPDATES}, "eval_batches": 2, "eval_tokens": 1}}\n')
    assert set(train(config, run).losses) == {4, 2, 1} and set(evaluated(run)) == {4, 2, 1}


@pytest.mark.parametrize("damage", [b"", b"\xff\n", b"abc\n"])
def test_a_damaged_digest_of_the_tokens_is_named(config, run, damage):
    (run / "tokens.sha256").write_bytes(damage)
    with pytest.raises(InputError, match="tokens.sha256 is damaged, expected 64 hex digits"):
        train(config, run)
    (run / "tokens.sha256").unlink()
    assert train(config, run).step == UPDATES
    assert len((run / "tokens.sha256").read_text()) == 65


def test_a_window_that_a_stop_cuts_is_recorded_whole(config, tmp_path, monkeypatch):
    """The mean loss of the updates before and after the stop is that of the run that was left alone."""
    config = with_train(config, log_every=4, checkpoint_every=3)
    train(config, tmp_path / "whole")
    original = prefetch.Prefetch.next_after

    def interrupted(self, metrics):
        self.number = getattr(self, "number", 0) + 1
        if self.number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(prefetch.Prefetch, "next_after", interrupted)
        assert train(config, tmp_path / "stopped").step == 6
    train(config, tmp_path / "stopped")
    timeless = [
        [{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_s", "data_wait")} for line in text]
        for text in ((tmp_path / name / log.METRICS).read_text().splitlines() for name in ("whole", "stopped"))
    ]
    assert timeless[0] == timeless[1] and [r["step"] for r in timeless[0]] == [4, 8, 8]


@pytest.mark.thorough
def test_raising_the_updates_says_what_becomes_of_the_rate(config, run, tmp_path, capsys):
    train(with_train(config, updates=2 * UPDATES), run)
    assert f"train.updates is {2 * UPDATES}, and was {UPDATES}: the cosine decay" in capsys.readouterr().out
    optimizer = dataclasses.replace(config.optimizer, decay="stable", decay_share=0.5, warmup=2)
    stable = with_train(dataclasses.replace(config, optimizer=optimizer), checkpoint_every=3, keep=9)
    train(stable, tmp_path / "stable")
    for later in (6, UPDATES):
        shutil.rmtree(tmp_path / "stable" / "checkpoints" / str(later))
    capsys.readouterr()
    # From before the fall nothing changes.
    train(with_train(stable, updates=2 * UPDATES), tmp_path / "stable")
    out = capsys.readouterr().out
    assert "resumed after update 3" in out and "train.updates is" not in out


@pytest.mark.thorough
def test_updates_are_traced_on_request(config, tmp_path, capsys):
    train(config, tmp_path, profile=2)
    assert f"a trace of 2 updates is in {tmp_path / 'profile'}" in capsys.readouterr().out
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    train(with_train(config, updates=UPDATES + 4), tmp_path, profile=9)
    assert "a trace of 1 updates is in" in capsys.readouterr().out


def test_a_second_run_in_the_same_directory_is_refused(config, run):
    from odelm.run_directory import RunDirectory

    with RunDirectory(run).locked(), pytest.raises(InputError, match=f"another process trains in {run}"):
        train(with_train(config, updates=UPDATES + 1), run)
    train(with_train(config, updates=UPDATES + 1), run)


def test_finished_run_is_not_recorded_twice(config, run):
    before = (run / log.METRICS).read_text()
    again = train(config, run)
    assert (again.step, again.losses, again.interrupted) == (UPDATES, evaluated(run), False)
    assert (run / log.METRICS).read_text() == before


def test_a_mesh_that_does_not_divide_the_parameters_leaves_no_run(config, tmp_path, monkeypatch):
    from odelm import sharding

    def indivisible(*_):
        raise InputError("mesh.tensor is 4, which does not divide")

    monkeypatch.setattr(sharding, "state_shardings", indivisible)
    with pytest.raises(InputError, match="does not divide"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_past_its_updates_shows_no_bar(config, run, capsys):
    train(with_train(config, updates=UPDATES + 1), run)
    assert f"{UPDATES + 1}/{UPDATES + 1}" in capsys.readouterr().out
    train(with_train(config, updates=3), run)
    out = capsys.readouterr().out
    assert f"already finished: {UPDATES + 1} updates" in out and "loss nan" not in out and "/3" not in out
    # What the run is stays written down as it is, and no next update is promised.
    assert read_config(run).train.updates == UPDATES + 1 and "decay" not in out


def with_other_source(config: odelm.Config, folder: Path, **data) -> odelm.Config:
    """Returns the config with a copy of its text in `folder`, and other options of its data."""
    shutil.copytree(config.data.source, folder)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(folder), **data))


def rewrite(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("word", "other"))


def test_changed_text_does_not_overwrite_the_tokenizer(config, tmp_path):
    config = with_other_source(with_train(config, updates=1), tmp_path / "texts")
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / "tokenizer.json").read_bytes()
    rewrite(tmp_path / "texts")
    with pytest.raises(odelm.InputError, match="the text gives another tokenizer"):
        train(config, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == before


def test_changed_text_is_refused_where_the_tokenizer_is_given(config, finished, tmp_path):
    given = shutil.copy(finished / "tokenizer.json", tmp_path)
    config = with_other_source(with_train(config, updates=1), tmp_path / "texts", tokenizer=str(given))
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / log.METRICS).read_text()
    # The same text written anew is the same text.
    for path in (tmp_path / "texts").iterdir():
        os.utime(path, ns=(1, 1))
    train(config, tmp_path / "run")
    rewrite(tmp_path / "texts")
    with pytest.raises(odelm.InputError, match="the text of corpus 'text' has changed"):
        train(config, tmp_path / "run")
    assert (tmp_path / "run" / log.METRICS).read_text() == before


def test_finished_run_is_evaluated_again_where_the_evaluation_asked_for_is_another(config, run):
    first = evaluated(run)
    again = train(with_train(config, eval_batches=1, eval_steps=(4, 1)), run)
    assert again.step == UPDATES and set(again.losses) == {4, 1} and again.losses[4] != first[4]
    records = [json.loads(line) for line in (run / log.METRICS).read_text().splitlines()]
    assert [record["eval_batches"] for record in records if "eval_loss" in record] == [2, 1]

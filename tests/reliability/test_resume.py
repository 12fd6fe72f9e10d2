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
from odelm.train import log, loop

UPDATES, STOP = 8, 5


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> odelm.Config:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(f"word{(7 * i + 3 * k) % 41} and" for k in range(60)))
    return odelm.Config(
        model=odelm.ModelConfig(vocab_size=300, width=32, heads=2, depth=4, max_length=32, dropout=0.1),
        data=odelm.DataConfig(
            corpus="text", source=str(folder), data_dir=str(tmp_path_factory.mktemp("data")), valid_fraction=0.1
        ),
        step_sampling=odelm.StepSamplingConfig(counts=(2, 4)),
        train=odelm.TrainConfig(
            updates=UPDATES, batch_size=4, length=16, eval_batches=2, checkpoint_every=4, log_every=1, unroll=False
        ),
    )


def params_of(workdir: Path) -> list[np.ndarray]:
    from flax import nnx

    model, _, _ = odelm.load(workdir)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def logged(workdir: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def test_interrupted_run_resumes_to_the_bit(config, tmp_path, monkeypatch):
    straight = loop.train(config, tmp_path / "straight")
    assert straight.step == UPDATES and not straight.interrupted

    original = log.Log.training

    def interrupt_after_stop(self, step, metrics):
        original(self, step, metrics)
        if step == STOP:
            os.kill(os.getpid(), signal.SIGINT)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "training", interrupt_after_stop)
        stopped = loop.train(config, tmp_path / "stopped")
    assert stopped.interrupted and stopped.step == STOP
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert len(params_of(tmp_path / "stopped")) > 0

    resumed = loop.train(config, tmp_path / "stopped")
    assert resumed.step == UPDATES and resumed.losses == straight.losses
    assert logged(tmp_path / "stopped") == logged(tmp_path / "straight")
    for left, right in zip(params_of(tmp_path / "straight"), params_of(tmp_path / "stopped"), strict=True):
        np.testing.assert_array_equal(left, right)


def test_records_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / log.METRICS
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    with log.Log(tmp_path, updates=9, start=1) as writer:
        writer.training(2, {"loss": 1.4, "tokens_per_s": 1.0})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [2.0, 1.4]


def test_finished_run_is_not_recorded_twice(config, tmp_path):
    first = loop.train(config, tmp_path)
    before = (tmp_path / log.METRICS).read_text()
    again = loop.train(config, tmp_path)
    assert (again.step, again.losses, again.interrupted) == (first.step, first.losses, False)
    assert (tmp_path / log.METRICS).read_text() == before


def test_a_run_past_its_updates_shows_no_bar(config, tmp_path, capsys):
    loop.train(config, tmp_path)
    assert f"{UPDATES}/{UPDATES}" in capsys.readouterr().out
    loop.train(dataclasses.replace(config, train=dataclasses.replace(config.train, updates=3)), tmp_path)
    out = capsys.readouterr().out
    assert f"already finished: {UPDATES} updates" in out and "loss nan" not in out and "/3" not in out


def with_other_source(config: odelm.Config, folder: Path, **data) -> odelm.Config:
    """Returns the config with a copy of its text in `folder`, and other options of its data."""
    shutil.copytree(config.data.source, folder)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(folder), **data))


def rewrite(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("word", "other"))


def test_changed_text_does_not_overwrite_the_tokenizer(config, tmp_path):
    config = with_other_source(config, tmp_path / "texts")
    loop.train(config, tmp_path / "run")
    before = (tmp_path / "run" / "tokenizer.json").read_bytes()
    rewrite(tmp_path / "texts")
    with pytest.raises(odelm.InputError, match="the text gives another tokenizer"):
        loop.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == before


def test_changed_text_is_refused_where_the_tokenizer_is_given(config, tmp_path):
    given = tmp_path / "tokenizer.json"
    loop.train(config, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", given)
    config = with_other_source(config, tmp_path / "texts", tokenizer=str(given))
    loop.train(config, tmp_path / "run")
    before = (tmp_path / "run" / log.METRICS).read_text()
    # The same text written anew is the same text.
    for path in (tmp_path / "texts").iterdir():
        os.utime(path, ns=(1, 1))
    loop.train(config, tmp_path / "run")
    rewrite(tmp_path / "texts")
    with pytest.raises(odelm.InputError, match="the text of corpus 'text' has changed"):
        loop.train(config, tmp_path / "run")
    assert (tmp_path / "run" / log.METRICS).read_text() == before


def test_finished_run_is_evaluated_again_where_the_evaluation_asked_for_is_another(config, tmp_path):
    first = loop.train(config, tmp_path)
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=1, eval_steps=(4, 1)))
    again = loop.train(other, tmp_path)
    assert again.step == UPDATES and set(again.losses) == {4, 1} and again.losses[4] != first.losses[4]
    records = [json.loads(line) for line in (tmp_path / log.METRICS).read_text().splitlines()]
    assert [record["eval_batches"] for record in records if "eval_loss" in record] == [2, 1]

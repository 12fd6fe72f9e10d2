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


def test_changed_text_does_not_overwrite_the_tokenizer(config, tmp_path):
    folder = tmp_path / "texts"
    shutil.copytree(config.data.source, folder)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(folder)))
    loop.train(config, tmp_path / "run")
    before = (tmp_path / "run" / "tokenizer.json").read_bytes()
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("word", "other"))
    with pytest.raises(odelm.InputError, match="the source has changed"):
        loop.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == before

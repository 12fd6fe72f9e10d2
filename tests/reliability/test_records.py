"""What a run records and reports while it trains, and which checkpoints are kept because of it."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import odelm
from odelm.checkpoint import Checkpoints
from odelm.checkpoint_files import CheckpointFiles
from odelm.config import replace
from odelm.data.loader import train_batches
from odelm.data.prepare import prepare
from odelm.train import health, log
from odelm.train.run import train

UPDATES = 6


@pytest.fixture
def config(corpus, tmp_path_factory) -> odelm.Config:
    return odelm.Config(
        model=odelm.ModelConfig(vocab_size=300, width=32, heads=2, depth=2, max_length=32),
        data=odelm.DataConfig(
            corpus="text", source=str(corpus), data_dir=str(tmp_path_factory.mktemp("data")), valid_fraction=0.1
        ),
        step_sampling=odelm.StepSamplingConfig(counts=(2,)),
        train=odelm.TrainConfig(
            updates=UPDATES, batch_size=4, length=16, eval_batches=2, eval_every=4, checkpoint_every=4, log_every=1,
            unroll=False,
        ),
    )  # fmt: skip


def records(workdir: Path) -> list[dict]:
    found = [json.loads(line) for line in (workdir / log.METRICS).read_text().splitlines()]
    return [record for record in found if "loss" in record]


def test_tokens_are_those_that_are_not_padding(config, tmp_path):
    config = replace(config, {"data.packing": "documents", "train.length": 32, "train.batch_size": 2})
    batches = train_batches(prepare(config), config)
    read = np.cumsum([int(next(batches)["weights"].sum()) for _ in range(UPDATES)])
    assert read[-1] < UPDATES * 2 * 32, "some are padding"
    train(replace(config, {"train.updates": 3}), tmp_path)
    train(config, tmp_path)
    assert {record["step"]: record["tokens"] for record in records(tmp_path)} == dict(enumerate(read.tolist(), 1))


def test_the_last_checkpoint_may_be_the_best(config, tmp_path):
    train(replace(config, {"train.keep": 1, "train.keep_best": 1}), tmp_path)
    losses = log.evaluated(tmp_path, 2)
    assert losses[UPDATES][2] < losses[4][2]
    assert CheckpointFiles(tmp_path).steps() == [UPDATES]


def test_a_checkpoint_that_was_evaluated_after_it_was_saved_may_be_the_best(tmp_path):
    losses = {2: {4: 2.0, 1: 9.0}, 3: {4: 3.0, 1: 1.0}}
    options = odelm.TrainConfig(keep=1, keep_best=1)
    checkpoints = Checkpoints(tmp_path, retention=options, evaluated=lambda: losses)
    for step in range(1, 5):
        checkpoints.save(step, {"a": jnp.ones(2)}, {"b": jnp.ones(2)}, {"eval_loss": {"4": 4.0}} if step == 1 else {})
    checkpoints.close()
    assert CheckpointFiles(tmp_path).steps() == [2, 4]


def test_a_checkpoint_says_what_made_it(config, tmp_path):
    train(replace(config, {"train.updates": 4, "train.eval_every": 2, "train.checkpoint_every": 2}), tmp_path)
    meta, prepared = CheckpointFiles(tmp_path).meta(2), prepare(config)
    assert meta["versions"]["odelm"] == odelm.__version__ and meta["tokens"] == prepared.digest
    assert len(meta["tokenizer_sha256"]) == 64 and meta["read"] == 2 * 4 * 16
    assert {int(steps): loss for steps, loss in meta["eval_loss"].items()} == log.evaluated(tmp_path, 2)[2]


def test_jumps_and_a_collapse_are_reported_while_they_happen(config, tmp_path, capsys, monkeypatch):
    """Every loss is called a jump behind the first two, of this process or of the one before."""
    monkeypatch.setattr(health, "RECORDS", 2)
    monkeypatch.setattr(health, "SPIKE", -100.0)
    train(replace(config, {"train.updates": 3}), tmp_path)
    assert "update 3: the loss has jumped" in capsys.readouterr().out
    monkeypatch.setattr(health, "COLLAPSE", 100.0)
    train(config, tmp_path)
    shown = capsys.readouterr().out
    for step in (4, 5, 6):
        assert f"update {step}: the loss has jumped" in shown
    assert "3 jumps of the loss" in shown and "update 4: the model predicts no more than token frequencies do" in shown

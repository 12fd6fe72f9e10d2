"""Metrics go to Weights & Biases too, as it keeps them without a network; what is missing is said before training."""

import importlib.util

import pytest

from odelm.errors import InputError
from odelm.train import log
from odelm.train.run import train


def test_without_the_package_it_is_said_at_once(monkeypatch, tmp_path):
    import odelm

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--wandb needs the package wandb, which is not installed: pip install"):
        train(odelm.Config(), tmp_path / "run", wandb="project")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_scalars_and_options_are_in_the_run(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    record = {"loss": 4.5, "tokens_per_s": 10.0, "data_wait": 0.0, "loss_by_steps": {"3": 4.5}}
    with log.Log(tmp_path, updates=2, start=0, wandb="project", options={"train": {"seed": 77}}) as written:
        written.training(1, record)
        written.training(2, record)
    importlib.import_module("wandb").teardown()  # its service may still be writing after a run has finished
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert content.count(b"train/loss_3_steps") >= 2 and b"77" in content

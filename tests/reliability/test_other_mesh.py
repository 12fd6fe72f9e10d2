"""A run that was saved on one mesh resumes on another, with the losses of the run that stayed where it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import odelm
from odelm.checkpoint import Checkpoints
from odelm.run_directory import CHECKPOINTS
from odelm.train.log import METRICS
from odelm.train.run import train

ROOT = Path(__file__).parents[2]
MESH = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
UPDATES = 6
pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture
def config(corpus, tmp_path) -> odelm.Config:
    return odelm.Config(
        model=odelm.ModelConfig(vocab_size=300, width=32, heads=2, depth=2, max_length=16, dropout=0.1),
        data=odelm.DataConfig(
            corpus="text", source=str(corpus), data_dir=str(tmp_path / "data"), valid_fraction=0.1
        ),
        step_sampling=odelm.StepSamplingConfig(kind="fixed"),
        optimizer=odelm.OptimizerConfig(warmup=0, average=0.9),
        train=odelm.TrainConfig(
            updates=UPDATES, batch_size=4, length=16, eval_batches=1, eval_steps=(2,), checkpoint_every=2, log_every=1,
            unroll=False,
        ),
    )  # fmt: skip


def numbers_of(workdir: Path) -> np.ndarray:
    """Returns the losses of all updates, the norms of their gradients, and the held-out loss of the mean."""
    records = [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]
    found = [(r["step"], r["loss"], r["gradient_norm"]) for r in records if "loss" in r]
    held_out = [(r["step"], loss, 0.0) for r in records for loss in r.get("eval_loss", {}).values()]
    assert [step for step, *_ in found + held_out] == [*range(1, UPDATES + 1), UPDATES]
    return np.array(found + held_out)


def resume_on_four_devices(workdir: Path, *options: str) -> str:
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    }
    done = subprocess.run(
        [sys.executable, "train.py", f"--workdir={workdir}", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_resumes_on_another_mesh_and_back(config, tmp_path, capsys):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(config, whole)
    shutil.copytree(whole, moved)
    shutil.rmtree(moved / CHECKPOINTS / str(UPDATES))
    printed = resume_on_four_devices(moved, *MESH, "--config.train.checkpoint_every=5", "--config.train.keep=9")
    assert "mesh: data 1, fsdp 2, tensor 2\n" in printed and "resumed after update 4\n" in printed
    # float32 sums in another order differ by a few units in the last place, 1e-7; two updates add to that.
    np.testing.assert_allclose(numbers_of(moved), numbers_of(whole), rtol=1e-5)

    assert Checkpoints(moved, read_only=True).steps() == [4, 5, 6]
    shutil.rmtree(moved / CHECKPOINTS / str(UPDATES))
    capsys.readouterr()
    train(config, moved)
    assert "resumed after update 5\n" in capsys.readouterr().out
    np.testing.assert_allclose(numbers_of(moved), numbers_of(whole), rtol=1e-5)

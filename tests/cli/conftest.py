"""Runs of the two programs on a text corpus of a few thousand words, shapes as small as they go."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from absl import flags

ROOT = Path(__file__).parents[2]


def program(name: str, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs train.py or infer.py as a user would, from the project's root."""
    command = [sys.executable, name, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def call(monkeypatch, capfd) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns `program` without a process of its own, which would spend seconds on imports."""
    monkeypatch.chdir(ROOT)
    # What the programs leave behind for good, because their process ends.
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(name, run_name="__main__")
        finally:
            defined = [flag.name for flag in flags.FLAGS.flags_by_module_dict()[name]]
            for flag in defined:
                delattr(flags.FLAGS, flag)
        return subprocess.CompletedProcess([name, *arguments], ended.value.code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        words = [f"word{(7 * i + 3 * k) % 41} and" for k in range(60)]
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="session")
def small(corpus, tmp_path_factory) -> list[str]:
    """Returns the overrides that make any recipe small."""
    options = {
        "data.corpus": "text",
        "data.source": corpus,
        "data.data_dir": tmp_path_factory.mktemp("data"),
        "data.valid_fraction": 0.1,
        "model.vocab_size": 300,
        "model.width": 32,
        "model.heads": 2,
        "model.depth": 4,
        "model.max_length": 32,
        "step_sampling.counts": "2,4",
        "train.length": 16,
        "train.batch_size": 4,
        "train.updates": 6,
        "train.eval_batches": 2,
        "train.checkpoint_every": 3,
        "train.log_every": 1,
        "train.unroll": "false",
    }
    return [f"--config.{name}={value}" for name, value in options.items()]


@pytest.fixture(scope="session")
def decoder(small, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "decoder"
    done = program("train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *small)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="session")
def encoder(small, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "encoder"
    heads = ["--config.model.embed_dim=16", "--config.model.sentence_order=true", "--config.model.token_types=2"]
    done = program("train.py", "--config=configs/tiny_encoder.py", f"--workdir={workdir}", *small, *heads)
    assert done.returncode == 0, done.stderr
    return workdir

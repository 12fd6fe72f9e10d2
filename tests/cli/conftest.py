"""Runs of the two programs on a text corpus of a few thousand words, shapes as small as they go."""

import contextlib
import importlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def program(name: str, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs train.py or infer.py as a user would, from the project's root."""
    command = [sys.executable, name, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module", autouse=True)
def runs_share_what_they_trace(traced_once) -> None:
    """What a program computes is tested elsewhere; here many runs and comparisons are of the same two models."""


def status_of(name: str, arguments: Sequence[str]) -> int:
    """Runs a program without a process of its own, which would spend seconds on imports."""
    main = importlib.import_module(f"odelm.programs.{name.removesuffix('.py')}").main
    with pytest.MonkeyPatch.context() as patch:
        # What the programs leave behind for good, because their process ends.
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        return main(arguments)


@pytest.fixture
def call(monkeypatch, capfd) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns a function like `program` that starts no process."""
    monkeypatch.chdir(ROOT)

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        status = status_of(name, arguments)
        return subprocess.CompletedProcess([name, *arguments], status, *capfd.readouterr())

    return run


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


HEADS = ["--config.model.embed_dim=16", "--config.model.sentence_order=true", "--config.model.token_types=2"]


def trained(workdir: Path, recipe: str, *options: str) -> None:
    with contextlib.chdir(ROOT):
        assert status_of("train.py", [f"--config=configs/{recipe}.py", f"--workdir={workdir}", *options]) == 0


@pytest.fixture(scope="session")
def decoder(small, once) -> Path:
    """Returns a finished run, which no test may change: the one that is trained as a user would."""

    def fill(workdir: Path) -> None:
        done = program("train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *small)
        assert done.returncode == 0, done.stderr

    return once("decoder", fill)


@pytest.fixture(scope="session")
def encoder(small, once) -> Path:
    """Returns a finished run, which no test may change."""
    return once("encoder", lambda workdir: trained(workdir, "tiny_encoder", *small, *HEADS))

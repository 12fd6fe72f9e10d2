"""lm-eval without a network, and tiny models in forms that both it and this library load.

Where it is not installed these tests are skipped; `make test-harness` installs it and sets ODELM_HARNESS, with which a
missing one is an error.
"""

import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from odelm import interop
from odelm import tokenizer as tokenizers

# Read when the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

RUN = Path(__file__).parents[1] / "fixtures" / "decoder_0_1"
"""A decoder whose one block knows its time, trained for six updates, with 300 tokens and 32 positions."""


def needed(name: str) -> Any:
    """Returns a module; skips the one that asks for it where it is not installed."""
    if os.environ.get("ODELM_HARNESS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed; make test-harness installs it")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> None:
    """Keeps what `datasets` makes of a file out of the user's home."""
    needed("datasets").config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def exported(make_model, tmp_path_factory) -> Path:
    """Returns a GPT-2 that was written by this library, with parameters at which everything matters."""
    options = dict(norm="layernorm", norm_eps=1e-5, positions="learned", qk_norm=False, bias=True, dtype="float32")
    model = make_model(**options, vocab_size=300, max_length=32)
    folder = tmp_path_factory.mktemp("exported") / "gpt2"
    interop.export(model, folder, tokenizer=tokenizers.load(RUN / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[..., str]:
    """Returns a function that makes one of lm-eval's own tasks of a local file, and returns the task's file."""
    yaml, folder = needed("yaml"), tmp_path_factory.mktemp("published")
    originals = Path(needed("lm_eval").__file__).parent / "tasks"

    def make(name: str, path: Path, split: str) -> str:
        task = {
            "include": str(originals / name),
            "task": f"local_{path.stem}",
            "tag": [],
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path)}},
            "training_split": None,
            "validation_split": None,
            "test_split": None,
        } | {f"{split}_split": split}
        file = folder / f"local_{path.stem}.yaml"
        file.write_text(yaml.safe_dump(task))
        return str(file)

    return make


@dataclass(frozen=True)
class Theirs:
    """What lm-eval finds."""

    metrics: dict[str, float]
    """With their standard errors."""
    asked: list[tuple[str, ...]]
    """The texts of every request, in order."""
    logs: list[float]
    """Their log-likelihoods."""


def evaluated(model, task: str) -> Theirs:
    """Returns what lm-eval finds for a model on the task of a file."""
    name = Path(task).stem
    manager = needed("lm_eval.tasks").TaskManager(include_path=str(Path(task).parent), include_defaults=False)
    found = needed("lm_eval").simple_evaluate(model, tasks=[name], task_manager=manager, bootstrap_iters=1000)
    assert found is not None
    metrics = {key: value for key, value in found["results"][name].items() if isinstance(value, float)}
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    asked = [tuple(texts) for sample in samples for texts in sample["arguments"]]
    answers = [answer for sample in samples for (answer,) in sample["resps"]]
    return Theirs(metrics, asked, [answer[0] if isinstance(answer, tuple) else answer for answer in answers])


def lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

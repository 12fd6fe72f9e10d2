"""A small corpus, the same in every run, and a config that prepares it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from odelm.config import Config
from odelm.data.prepare import Prepared, prepare

WORDS = "the a field block depth step time state norm grid solver flows turns adds reads holds to of and in".split()


def documents(count: int) -> list[str]:
    """Returns `count` different texts of 20 to 59 words, from a fixed linear congruence."""
    state, texts = 1, []
    for number in range(count):
        words = []
        for _ in range(20 + number * 7 % 40):
            state = (state * 1103515245 + 12345) % 2**31
            words.append(WORDS[(state >> 16) % len(WORDS)])
        texts.append(f"{number}: {' '.join(words)}.\n")
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_config(source: Path, data_dir: Path) -> Config:
    """Returns a config over `source` with a vocabulary of 300, rows of 16 tokens and batches of 4."""
    config = Config()
    config.data.corpus, config.data.source, config.data.data_dir = "text", str(source), str(data_dir)
    config.data.valid_fraction = 0.2
    config.model.vocab_size = 300
    config.train.length, config.train.batch_size = 16, 4
    return config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(write_jsonl(tmp_path / "docs.jsonl", documents(40)), tmp_path / "cache")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Callable[[], Config]]:
    """A corpus prepared once, and a maker of fresh configs over it."""
    folder = tmp_path_factory.mktemp("shared")
    source = write_jsonl(folder / "docs.jsonl", documents(40))
    return prepare(make_config(source, folder / "cache")), lambda: make_config(source, folder / "cache")

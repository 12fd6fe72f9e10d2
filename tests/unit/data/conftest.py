"""A small corpus, prepared once or anew."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpus import documents, make_config, write_jsonl

from odelm.config import Config
from odelm.data.prepare import prepare
from odelm.data.tokens import Prepared


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(write_jsonl(tmp_path / "docs.jsonl", documents(40)), tmp_path / "cache")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Callable[[], Config]]:
    """A corpus prepared once, and a maker of fresh configs over it."""
    folder = tmp_path_factory.mktemp("shared")
    source = write_jsonl(folder / "docs.jsonl", documents(40))
    return prepare(make_config(source, folder / "cache")), lambda: make_config(source, folder / "cache")

"""Splits, TFDS round trip, and what a failed or repeated preparation leaves."""

import os
import sysconfig
from pathlib import Path

import pytest
from small_corpus import documents, make_config, write_jsonl
from tensorflow_datasets.core.utils import gcs_utils

from odelm.config import Config, DataConfig
from odelm.data import corpora
from odelm.data.corpora import find_corpus
from odelm.data.documents import is_held_out
from odelm.errors import InputError


def read(config: Config) -> dict[str, list[str]]:
    return {split: list(find_corpus(config.data).documents(split)) for split in corpora.SPLITS}


def test_every_document_is_in_one_split(config: Config):
    splits = read(config)
    assert sorted(splits["train"] + splits["validation"]) == sorted(documents(40))
    assert splits["validation"] and all(is_held_out(text, 0.2) for text in splits["validation"])


def test_identical_documents_share_a_split(tmp_path: Path):
    source = write_jsonl(tmp_path / "docs.jsonl", documents(40) * 2)
    splits = read(make_config(source, tmp_path / "cache"))
    assert set(splits["train"]).isdisjoint(splits["validation"])
    assert all(splits[name].count(text) == 2 for name in splits for text in splits[name])


def test_the_split_is_stable():
    """The literal is what this hash gave when it was written: if it changes, held-out text has become training
    text for every model trained so far."""
    assert [number for number in range(40) if is_held_out(f"document {number}", 0.2)] == [
        0,
        5,
        8,
        9,
        12,
        21,
        22,
        29,
        30,
    ]
    assert sum(is_held_out(str(number), 0.1) for number in range(10_000)) == pytest.approx(1000, abs=90)  # 3 sigma


def test_the_standard_library_by_its_declared_encodings(tmp_path: Path, monkeypatch):
    root = tmp_path / "lib"
    (root / "package").mkdir(parents=True)
    (root / "site-packages").mkdir()
    for number in range(20):
        (root / "package" / f"m{number}.py").write_text(f"value = {number}\n")
    (root / "latin.py").write_bytes(b"# coding: latin-1\nname = 'caf\xe9'\n")
    (root / "broken.py").write_bytes(b"name = '\xff'\n")
    (root / "site-packages" / "other.py").write_text("other = 1\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    config = Config(data=DataConfig(data_dir=str(tmp_path / "cache"), valid_fraction=0.3))
    found = [text for split in read(config).values() for text in split]
    expected = [f"value = {number}\n" for number in range(20)] + ["# coding: latin-1\nname = 'café'\n"]
    assert sorted(found) == sorted(expected)
    assert "3." in find_corpus(config.data).config.name


def test_nothing_is_printed_or_fetched(config: Config, capfd, monkeypatch):
    monkeypatch.setattr(gcs_utils, "exists", lambda path: pytest.fail(f"looked for {path}"))
    read(config)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("texts", "fraction", "expected"),
    [
        (["", "  "], 0.2, "the corpus is empty"),
        (documents(3), 1e-6, "no document fell into the validation split .* raise data.valid_fraction"),
        (documents(3), 0.999999, "no document fell into the train split .* lower data.valid_fraction"),
    ],
)
def test_an_empty_split_is_an_error_and_leaves_nothing(
    tmp_path: Path, texts: list[str], fraction: float, expected: str
):
    config = make_config(write_jsonl(tmp_path / "docs.jsonl", texts), tmp_path / "cache")
    config.data.valid_fraction = fraction
    with pytest.raises(InputError, match=expected):
        read(config)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_an_interrupted_preparation_is_not_taken_for_whole(config: Config, monkeypatch):
    def interrupted(path: Path):
        yield documents(1)[0]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpora, "text_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read(config)
    assert len(sum(read(config).values(), [])) == 40


def test_a_changed_file_is_another_corpus(config: Config):
    first = find_corpus(config.data).directory
    os.utime(config.data.source, ns=(0, 0))
    assert find_corpus(config.data).directory != first

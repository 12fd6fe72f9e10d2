"""Splits, copies, TFDS round trip, and what a failed or repeated preparation leaves."""

import collections
import os
import sysconfig
import tempfile
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import documents, files_of, inner_archives, make_config, read, tar_of, texts_of, write_jsonl
from tensorflow_datasets.core.utils import gcs_utils

from odelm.config import Config, DataConfig, replace
from odelm.data.corpus import find_corpus
from odelm.data.sources import document_shards
from odelm.data.sources.corpora import BUILDERS
from odelm.data.sources.documents import digest, is_held_out


def test_every_document_is_in_one_split_in_the_order_of_tfds(config: Config):
    splits = read(config)
    assert texts_of(config) == sorted(documents(40))
    assert splits["validation"] and all(is_held_out(digest(item.text), 0.2) for item in splits["validation"])
    assert {item.component for item in splits["train"]} == {"docs"}
    orders = [[item.text for item in split] for split in splits.values()]
    assert all(order != [text for text in documents(40) if text in order] for order in orders)


def test_the_split_is_stable():
    """The literal is what this hash gave when it was written: if it changes, held-out text has become training
    text for every model trained so far."""
    held_out = [number for number in range(40) if is_held_out(digest(f"document {number}"), 0.2)]
    assert held_out == [0, 5, 8, 9, 12, 21, 22, 29, 30]
    share = sum(is_held_out(digest(str(number)), 0.1) for number in range(10_000))
    assert share == pytest.approx(1000, abs=90)  # 3 sigma


def test_of_copies_one_is_kept_across_lines_files_and_parts(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(document_shards, "SHARD_BYTES", 1)
    folder = tmp_path / "in"
    folder.mkdir()
    for name, texts in (("a", documents(40) + documents(5)), ("b", documents(30)), ("c", documents(41)[35:])):
        write_jsonl(folder / f"{name}.jsonl", texts)
    config = make_config(folder, tmp_path / "cache")
    splits = read(config)
    assert texts_of(config) == sorted(documents(41))
    components = collections.Counter(item.component for split in splits.values() for item in split)
    assert components == {"a": 40, "c": 1}, "the first copy is the one kept"
    assert find_corpus(config.data).report()["duplicates"] == 5 + 30 + 5


@settings(max_examples=15, deadline=None)
@given(files=st.lists(st.lists(st.text("ab ", max_size=4), max_size=12), min_size=1, max_size=4))
def test_no_document_is_lost_kept_twice_or_in_both_splits(files: list[list[str]]):
    different = {text for texts in files for text in texts if text.strip()}
    held_out = {text for text in different if is_held_out(digest(text), 0.3)}
    if not held_out or held_out == different:
        return
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_shards, "SHARD_BYTES", 40)
        for number, texts in enumerate(files):
            write_jsonl(Path(name, f"{number}.jsonl"), texts)
        config = make_config(Path(name), Path(name, "cache"))
        config = replace(config, {"data.valid_fraction": 0.3})
        splits = read(config)
    splits = {split: sorted(item.text for item in items) for split, items in splits.items()}
    assert splits == {"train": sorted(different - held_out), "validation": sorted(held_out)}


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
    expected = [f"value = {number}\n" for number in range(20)] + ["# coding: latin-1\nname = 'café'\n"]
    assert texts_of(config) == sorted(expected)
    assert "3." in find_corpus(config.data).name


@pytest.mark.parametrize("name", BUILDERS)
def test_each_builder_has_a_card(name: str, tmp_path: Path):
    info = BUILDERS[name](data_dir=tmp_path).info
    assert info.description and info.homepage.startswith("https://") or name == "text"
    assert info.citation or name == "text"
    assert set(info.features) == {"text", "pile_set_name" if name == "pile" else "component"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["text", "openwebtext"])
def test_a_builder_alone_is_an_ordinary_tfds_dataset(name: str, tmp_path: Path):
    manual = tmp_path / "manual"
    manual.mkdir()
    if name == "text":
        write_jsonl(manual / "docs.jsonl", documents(200))
    else:
        (manual / "openwebtext.tar").write_bytes(tar_of(inner_archives(documents(200), 3)))
    made = BUILDERS[name](data_dir=tmp_path / "tfds")
    how = tfds.download.DownloadConfig(manual_dir=manual)
    made.download_and_prepare(download_config=how, file_format="array_record")
    config = make_config(manual, tmp_path / "cache")
    config = replace(config, {"data.corpus": name, "data.valid_fraction": 0.02})
    for split, expected in read(config).items():
        found = [item["text"].decode() for item in made.as_data_source(split)]
        assert found == [document.text for document in expected] and found
    again = tfds.builder_from_directory(made.data_dir)
    assert again.info.splits["train"].num_examples == len(made.as_data_source("train"))
    assert again.info.description and again.info.features["component"]


def test_nothing_is_printed_or_fetched(config: Config, capfd, monkeypatch):
    monkeypatch.setattr(gcs_utils, "exists", lambda path: pytest.fail(f"looked for {path}"))
    read(config)
    assert capfd.readouterr() == ("", "")


def test_a_changed_file_is_another_corpus(config: Config):
    first = find_corpus(config.data).name
    os.utime(config.data.source, ns=(0, 0))
    assert find_corpus(config.data).name != first


def test_only_the_corpus_is_left(config: Config):
    read(config)
    folder = find_corpus(config.data).directory  # pyright: ignore
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, ".locks"}
    assert sorted(files_of(folder)) and not any("parts" in name for name in files_of(folder))

"""Data prepared by version 0.1 are found again and read: the names of their folders, and what is in them."""

import shutil
from pathlib import Path

import pytest

from odelm.config import Config, DataConfig, ModelConfig
from odelm.data import corpus as corpora
from odelm.data.corpus import find_corpus
from odelm.data.prepare import prepare

PREPARED = Path(__file__).parents[1] / "fixtures" / "prepared_0_1"
CORPUS, TOKENIZER, TOKENS = "text-30419ceeacdb014d", "cdb353a1cc4f0159", "text-8324b63b9d7ffdb3"
DIGEST = "3be5aef49986cc8b149a483f89976940689f29ffe8ac2933e363853e0cd3ce13"


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """The options with which the folder was prepared, and a copy of it as their data directory."""
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(_text(number))
    # A corpus is named after the paths and times of its files, which differ here.
    monkeypatch.setattr(corpora, "stats", lambda files: [(path.name, path.stat().st_size, 0) for path in files])
    data_dir = tmp_path / "data"
    shutil.copytree(PREPARED, data_dir)
    data = DataConfig(corpus="text", source=str(tmp_path), data_dir=str(data_dir), valid_fraction=0.3)
    return Config(data=data, model=ModelConfig(vocab_size=280))


def _text(number: int) -> str:
    return f"text {number}: " + "a word or two, " * (number + 1)


def test_documents_of_an_older_corpus_are_read(config):
    corpus = find_corpus(config.data)
    assert corpus.name == CORPUS
    documents = [d.text for split in ("train", "validation") for d in corpus.documents(split)]
    assert sorted(documents) == sorted(_text(number) for number in range(12))


def test_tokens_of_an_older_version_are_found_and_not_made_again(config, capsys):
    prepared = prepare(config)
    assert prepared.directory.name == TOKENS
    assert "prepared" not in capsys.readouterr().err
    assert (prepared.digest, prepared.train_tokens) == (DIGEST, 305)


@pytest.mark.parametrize("kept", ["nothing", "tokenizers", "corpora"])
def test_what_is_prepared_anew_gets_the_same_name_and_tokens(config, kept):
    data_dir = Path(config.data.data_dir)
    for folder in ("tokens", "corpora", "tokenizers"):
        if folder != kept:
            shutil.rmtree(data_dir / folder)
    prepared = prepare(config)
    assert (prepared.directory.name, prepared.digest) == (TOKENS, DIGEST)
    assert [path.name for path in (data_dir / "tokenizers").iterdir()] == [TOKENIZER]

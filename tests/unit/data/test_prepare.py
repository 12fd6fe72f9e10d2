"""Token files hold the corpus, are found again, and are whole or absent."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_corpus import documents, flat, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from odelm.config import Config, replace
from odelm.data.corpus import FileCorpus, find_corpus
from odelm.data.prepare import prepare
from odelm.errors import InputError


def refuse(*arguments, **options):
    pytest.fail("the source was read again")


def test_tokens_are_the_documents_each_ended(config: Config):
    prepared = prepare(config)
    for name, split in (("train", prepared.train), ("validation", prepared.validation)):
        texts = [document.text for document in find_corpus(config.data).documents(name)]
        tokens = flat(split)
        assert split.keys() == {"docs"} and tokens.dtype == np.uint16 and tokens[-1] == 1
        parts = np.split(tokens, np.flatnonzero(tokens == 1) + 1)[:-1]
        assert [prepared.tokenizer.decode(part.tolist()) for part in parts] == texts
        assert split["docs"].lengths.tolist() == [len(part) for part in parts]
    size = sum(len(document.text.encode()) for document in find_corpus(config.data).documents("validation"))
    assert prepared.bytes_per_token == size / len(flat(prepared.validation))


def test_a_second_call_reads_no_source(config: Config, monkeypatch, capsys):
    first = prepare(config)
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("odelm.data.sources.corpora.text_documents", refuse)
    monkeypatch.setattr(FileCorpus, "documents", refuse)
    second = prepare(config)
    assert second.directory == first.directory
    np.testing.assert_array_equal(flat(second.train), flat(first.train))
    assert capsys.readouterr() == ("", "")


def test_a_changed_file_is_prepared_again(config: Config):
    first = prepare(config)
    write_jsonl(Path(config.data.source), documents(41))
    second = prepare(config, tokenizer_file=first.directory / "tokenizer.json")
    assert second.directory != first.directory
    assert sum(len(split["docs"].lengths) for split in (second.train, second.validation)) == 41


@pytest.mark.parametrize(("part", "name", "value"), [("data", "valid_fraction", 0.3), ("model", "vocab_size", 290)])
def test_what_matters_is_in_the_key(config: Config, part: str, name: str, value: float):
    first = prepare(config).directory
    config = replace(config, {f"{part}.{name}": value})
    assert prepare(config).directory != first


def test_what_does_not_matter_is_not(config: Config):
    first = prepare(config).directory
    config = replace(config, {"train.seed": 3, "model.width": 64, "data.vocab_size": 300, "model.vocab_size": 1000})
    assert prepare(config).directory == first


def test_a_copy_of_the_tokenizer_finds_the_same_tokens(config: Config, tmp_path: Path):
    first = prepare(config)
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(json.loads((first.directory / "tokenizer.json").read_text())))
    config = replace(config, {"model.vocab_size": 1000})
    assert prepare(config, tokenizer_file=copy).directory == first.directory
    config = replace(config, {"data.tokenizer": str(copy)})
    assert prepare(config).directory == first.directory


def test_a_tokenizer_larger_than_the_model_is_an_error(config: Config):
    file = prepare(config).directory / "tokenizer.json"
    config = replace(config, {"model.vocab_size": 299})
    with pytest.raises(InputError, match="300 tokens, more than model.vocab_size 299"):
        prepare(config, tokenizer_file=file)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_data_dir_that_cannot_be_is_named(config: Config, tmp_path: Path, place: str):
    (tmp_path / "file").touch()
    config = replace(config, {"data.data_dir": str(tmp_path / place)})
    with pytest.raises(InputError, match=f"{tmp_path / place}.*data.data_dir"):
        prepare(config)


def test_golden_tokens(config: Config):
    """The literals are what a fixed corpus gave when this was written: a change means that tokens prepared
    before and after are not comparable, and then `FORMAT` must be raised."""
    prepared = prepare(config)
    assert (prepared.train_tokens, len(flat(prepared.validation))) == (3330, 307)
    texts = [document.text[:7] for document in find_corpus(config.data).documents("train", 0, 4)]
    assert texts == ["11: gri", "31: add", "0: and ", "1: time"]
    assert flat(prepared.train)[:12].tolist() == [21, 21, 30, 225, 299, 77, 72, 225, 76, 267, 263, 225]
    assert prepared.digest[:16] == "ea19b77561eb1ec4"


def test_an_end_token_that_text_can_spell_is_an_error(config: Config, tmp_path: Path):
    """Documents are told apart by it."""
    names = ["[UNK]", "[SEP]", "the"]
    plain = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.save(str(tmp_path / "plain.json"))
    write_jsonl(Path(config.data.source), [*documents(40), "the [SEP] the"])
    with pytest.raises(InputError, match=r"end token '\[SEP\]' is also produced by text"):
        prepare(config, tokenizer_file=tmp_path / "plain.json")

"""Token files hold the corpus, are found again, and are whole or absent."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from small_corpus import documents, write_jsonl

from odelm.config import Config
from odelm.data import prepare as module
from odelm.data.corpora import find_corpus
from odelm.data.prepare import prepare
from odelm.errors import InputError


def refuse(*arguments, **options):
    pytest.fail("the source was read again")


def test_tokens_are_the_documents_each_ended(config: Config):
    prepared = prepare(config)
    for split, tokens in (("train", prepared.train), ("validation", prepared.validation)):
        texts = list(find_corpus(config.data).documents(split))
        assert tokens.dtype == np.uint16 and tokens[-1] == 1
        parts = np.split(tokens, np.flatnonzero(tokens == 1) + 1)[:-1]
        assert [prepared.tokenizer.decode(part.tolist()) for part in parts] == texts
    size = sum(len(text.encode()) for text in find_corpus(config.data).documents("validation"))
    assert prepared.bytes_per_token == size / len(prepared.validation)


def test_a_second_call_reads_no_source(config: Config, monkeypatch, capsys):
    first = prepare(config)
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("odelm.data.corpora.text_documents", refuse)
    monkeypatch.setattr("odelm.data.corpora.Corpus.documents", refuse)
    second = prepare(config)
    assert second.directory == first.directory
    np.testing.assert_array_equal(second.train, first.train)
    assert capsys.readouterr() == ("", "")


def test_a_changed_file_is_prepared_again(config: Config):
    first = prepare(config)
    write_jsonl(Path(config.data.source), documents(41))
    second = prepare(config, tokenizer_file=first.directory / "tokenizer.json")
    assert second.directory != first.directory
    assert (second.train == 1).sum() + (second.validation == 1).sum() == 41


@pytest.mark.parametrize(("part", "name", "value"), [("data", "valid_fraction", 0.3), ("model", "vocab_size", 290)])
def test_what_matters_is_in_the_key(config: Config, part: str, name: str, value: float):
    first = prepare(config).directory
    setattr(getattr(config, part), name, value)
    assert prepare(config).directory != first


def test_what_does_not_matter_is_not(config: Config):
    first = prepare(config).directory
    config.train.seed, config.model.width, config.data.vocab_size, config.model.vocab_size = 3, 64, 300, 1000
    assert prepare(config).directory == first


def test_a_copy_of_the_tokenizer_finds_the_same_tokens(config: Config, tmp_path: Path):
    first = prepare(config)
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(json.loads((first.directory / "tokenizer.json").read_text())))
    config.model.vocab_size = 1000
    assert prepare(config, tokenizer_file=copy).directory == first.directory
    config.data.tokenizer = str(copy)
    assert prepare(config).directory == first.directory


def test_a_tokenizer_larger_than_the_model_is_an_error(config: Config):
    file = prepare(config).directory / "tokenizer.json"
    config.model.vocab_size = 299
    with pytest.raises(InputError, match="300 tokens, more than model.vocab_size 299"):
        prepare(config, tokenizer_file=file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "prepared.json").write_text(""),
        lambda folder: (folder / "prepared.json").write_text("{}"),
        lambda folder: (folder / "prepared.json").write_text("null"),
        lambda folder: (folder / "prepared.json").unlink(),
        lambda folder: (folder / "train.bin").write_bytes(b""),
    ],
)
def test_damaged_tokens_are_named(config: Config, damage):
    folder = prepare(config).directory
    damage(folder)
    with pytest.raises(InputError, match=f"{folder} .*remove it"):
        prepare(config)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_data_dir_that_cannot_be_is_named(config: Config, tmp_path: Path, place: str):
    (tmp_path / "file").touch()
    config.data.data_dir = str(tmp_path / place)
    with pytest.raises(InputError, match=f"{tmp_path / place}.*data.data_dir"):
        prepare(config)


def test_an_interrupted_call_is_not_taken_for_whole(config: Config, monkeypatch):
    def interrupted(tokenizer, texts):
        yield [1, 2, 3]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.tokenizers, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert list((Path(config.data.data_dir) / "tokens").iterdir()) == []
    prepared = prepare(config)
    assert (prepared.train == 1).sum() + (prepared.validation == 1).sum() == 40


def _prepare_from(values: str, directories) -> None:
    from odelm.config import from_json

    directories.put(str(prepare(from_json(values)).directory))


def test_two_processes_at_once_agree(config: Config):
    from odelm.config import to_json

    context = multiprocessing.get_context("spawn")
    directories = context.Queue()
    workers = [context.Process(target=_prepare_from, args=(to_json(config), directories)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = {directories.get(timeout=240) for _ in workers}
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0] and len(found) == 1
    assert prepare(config).directory == Path(found.pop())


def test_the_loser_of_a_race_keeps_the_winners_tokens(config: Config, monkeypatch):
    write = module._write

    def overtaken(corpus, tokenizer, directory):
        monkeypatch.setattr(module, "_write", write)
        winner = prepare(config).directory
        (winner / "mark").touch()
        write(corpus, tokenizer, directory)

    monkeypatch.setattr(module, "_write", overtaken)
    assert (prepare(config).directory / "mark").exists()


def test_golden_tokens(config: Config):
    """The literals are what a fixed corpus gave when this was written: a change means that tokens prepared
    before and after are not comparable, and then `FORMAT` must be raised."""
    prepared = prepare(config)
    assert (len(prepared.train), len(prepared.validation)) == (3330, 307)
    assert prepared.train[:12].tolist() == [22, 27, 30, 261, 89, 86, 82, 87, 225, 70, 268, 71]

"""A single file of text is a corpus: trained on to a place near its end, and held out from there."""

import gzip
import itertools

import pytest

from odelm.config import Config, DataConfig, ModelConfig
from odelm.data.corpus import FileCorpus, find_corpus
from odelm.data.one_text import OneText
from odelm.data.prepare import prepare
from odelm.errors import InputError

PARAGRAPH = "some words of a paragraph, and more of them.\nA second line of it.\n\n"


def config(path, tmp_path, **options) -> Config:
    data = DataConfig(corpus="text", source=str(path), data_dir=str(tmp_path / "data"), **options)
    return Config(data=data, model=ModelConfig(vocab_size=300))


def parts(corpus) -> tuple[str, str]:
    return tuple(document.text for split in ("train", "validation") for document in corpus.documents(split))


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
@pytest.mark.parametrize(
    ("text", "cut"), [(PARAGRAPH * 100, "\n\n"), ("a line of words\n" * 400, "\n"), ("word " * 2000, " ")]
)
def test_the_parts_are_the_text_cut_at_its_best_place(tmp_path, text, cut, fraction):
    path = tmp_path / "book.txt"
    path.write_text(text)
    corpus = find_corpus(config(path, tmp_path, valid_fraction=fraction).data)
    train, held_out = parts(corpus)
    assert train + held_out == text and train.endswith(cut)
    assert fraction * len(text) <= len(held_out) <= 2 * fraction * len(text) + 1
    assert corpus.size("train") == (1, len(train)) and corpus.size("validation") == (1, len(held_out))
    assert list(corpus.documents("train", 1)) == list(corpus.documents("train", 0, 0)) == []


def test_a_text_without_spaces_is_cut_all_the_same(tmp_path):
    path = tmp_path / "dna.txt"
    path.write_text("acgt" * 250)
    assert [len(part) for part in parts(find_corpus(config(path, tmp_path).data))] == [980, 20]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_prepared_and_what_is_held_out_is_said(tmp_path, capsys, workers):
    path = tmp_path / "book.txt.gz"
    path.write_bytes(gzip.compress((PARAGRAPH * 200).encode()))
    prepared = prepare(config(path, tmp_path), workers=workers)
    told = capsys.readouterr().err
    assert told.count("is one document: its last 268 of 13,400 characters are held out") == 1
    streams = [split[name] for split in (prepared.train, prepared.validation) for name in split]
    assert [len(stream.lengths) for stream in streams] == [1, 1]
    texts = [prepared.tokenizer.decode(stream.tokens[: len(stream.tokens) - 1].tolist()) for stream in streams]
    assert "".join(texts) == PARAGRAPH * 200
    prepare(config(path, tmp_path), workers=workers)
    assert "is one document" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "a", "  \n\n ", "word" + " " * 1000])
def test_a_text_that_is_too_short_is_told(tmp_path, text):
    path = tmp_path / "book.txt"
    path.write_text(text)
    with pytest.raises(InputError, match="book.txt (has no text|is too short to hold out a part)"):
        prepare(config(path, tmp_path))


def test_two_files_and_lines_are_split_by_documents(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(PARAGRAPH)
    (tmp_path / "c.jsonl").write_text('{"text": "words"}\n' * 3)
    assert isinstance(find_corpus(config(tmp_path, tmp_path).data), FileCorpus)
    assert isinstance(find_corpus(config(tmp_path / "c.jsonl", tmp_path).data), FileCorpus)
    assert isinstance(find_corpus(config(tmp_path / "a.txt", tmp_path).data), OneText)


def test_its_name_says_what_it_depends_on(tmp_path):
    path = tmp_path / "book.txt"
    names = []
    for text, fraction in itertools.product((PARAGRAPH * 9, PARAGRAPH * 10), (0.1, 0.2)):
        path.write_text(text)
        names.append(find_corpus(config(path, tmp_path, valid_fraction=fraction).data).name)
    assert len(set(names)) == 4

"""Held-out windows that stand in the training text are counted, wherever they stand there."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from odelm.config import Config, DataConfig, ModelConfig
from odelm.data import overlap as overlaps
from odelm.data.overlap import WINDOW, Overlap, hashes_of, overlap
from odelm.data.prepare import prepare
from odelm.data.tokens import Stream, index


def split_of(*documents):
    """Returns one component; each document gets the end token 0."""
    tokens = np.concatenate([np.array([*document, 0], np.uint16) for document in documents])
    return {"text": Stream(tokens, np.array([len(document) + 1 for document in documents]))}


def test_a_passage_is_found_at_any_place(monkeypatch):
    monkeypatch.setattr(overlaps, "CHUNK", 50)
    draw = np.random.default_rng(0).integers(1, 2**16, 2000)
    passage, own = draw[:100], draw[100:200]
    held_out = split_of(own, [*own[:7], *passage], passage)
    # Three windows of the first document, three of the next, of which none is cut where the passage is in training,
    # and three of the last.
    for place in range(0, 90, 13):
        train = split_of(draw[300:400], [*draw[500 : 500 + place], *passage], draw[600:700])
        assert overlap(train, held_out) == Overlap(9, 2 + 3)
    assert overlap(split_of(draw[300:400]), held_out) == Overlap(9, 0)
    assert overlap(held_out, held_out) == Overlap(9, 9)
    for length in (5, 31):
        assert overlap(split_of(draw[:length]), split_of(draw[:length])) == Overlap(0, 0), "an end token is no text"
    assert overlap(split_of(draw[:63]), split_of(draw[:63])) == Overlap(1, 1)
    assert "5 of 9 held-out windows of 32 tokens (55.56%)" in str(Overlap(9, 5))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_counts_are_those_of_sets_of_windows(seed, words):
    draw = np.random.default_rng(seed)
    # Few different tokens, so that windows come again by chance.
    train, held_out = ([draw.integers(1, 1 + words, draw.integers(1, 90)).tolist() for _ in range(4)] for _ in range(2))
    row = split_of(*train)["text"].tokens[:].tolist()
    known = {tuple(row[i : i + WINDOW]) for i in range(len(row) - WINDOW + 1)}
    cut = [tuple(d[i : i + WINDOW]) for d in held_out for i in range(0, len(d) - WINDOW + 1, WINDOW)]
    expected = Overlap(len(cut), sum(window in known for window in cut))
    assert overlap(split_of(*train), split_of(*held_out)) == expected


def test_hashes_tell_windows_apart():
    tokens = np.random.default_rng(0).integers(0, 2, 5000)
    windows = {tuple(tokens[i : i + WINDOW]) for i in range(len(tokens) - WINDOW + 1)}
    assert len(set(hashes_of(tokens).tolist())) == len(windows)


def test_preparing_counts_it_and_says_so(tmp_path, capfd):
    shared = "the very same long passage stands in each of these documents, word for word and line for line, "
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_text(shared + f"and then comes a number, {number * 7919}. " * 3)
    data = DataConfig(corpus="text", source=str(tmp_path), data_dir=str(tmp_path / "data"), valid_fraction=0.2)
    config = Config(model=ModelConfig(vocab_size=261), data=data)
    prepared = prepare(config)
    counted = index(prepared.directory)["overlap"]
    assert counted["window"] == WINDOW and 0 < counted["in_training"] < counted["windows"]
    assert f"{counted['in_training']:,} of {counted['windows']:,} held-out windows" in capfd.readouterr().err
    assert json.dumps(counted) == json.dumps(vars(overlap(prepared.train, prepared.validation)))

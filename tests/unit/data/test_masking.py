"""Masked rows: by construction, and by distribution."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import flat
from tokenizers import Tokenizer, models

from odelm.config import replace
from odelm.data.masking import MaskedRows, masked_rows
from odelm.data.spans import find_words
from odelm.errors import InputError
from odelm.tokenizer import special_ids

CLS, SEP, MASK, PAD, END = 2, 3, 4, 0, 1

UNITS = ("token", "word", "span")

WINDOWS = st.lists(st.one_of(st.just(END), st.integers(5, 299)), max_size=62)
"""Of text and end tokens, short, full or empty; the tests cut them where a row has less room."""


def rows_of(
    shared, *, length: int = 64, sentence_order: bool = False, rate: float = 0.15, types: int = 0, unit: str = "token"
) -> MaskedRows:
    prepared, new_config = shared
    config = new_config()
    config = replace(config, {"data.mask_unit": unit})
    config = replace(
        config, {"model.kind": "encoder", "model.sentence_order": sentence_order, "model.token_types": types}
    )
    config = replace(config, {"data.mask_rate": rate})
    return masked_rows(prepared.tokenizer, config, length=length, stream="test")


def original(row: dict[str, np.ndarray]) -> np.ndarray:
    """Undoes the masking."""
    tokens, counted = row["tokens"].copy(), row["weights"] == 1
    tokens[row["positions"][counted]] = row["targets"][counted]
    return tokens


def test_a_row_is_cls_window_sep_and_targets_are_the_originals(shared):
    rows, window = rows_of(shared), flat(shared[0].train)[:62].astype(np.int32)
    for index in range(20):
        row = rows.row(index, window)
        np.testing.assert_array_equal(original(row), [CLS, *window, SEP])
        assert row["mask"].all() and row["weights"].all() and len(row["positions"]) == round(0.15 * 64)
        assert (np.diff(row["positions"]) > 0).all()
        changed = np.flatnonzero(row["tokens"] != original(row))
        assert np.isin(changed, row["positions"]).all()


def test_special_tokens_are_never_chosen_and_never_drawn(shared):
    special = special_ids(shared[0].tokenizer)
    window = np.where(np.arange(62) % 3 == 0, END, flat(shared[0].train)[:62]).astype(np.int32)
    for index in range(50):
        row = rows_of(shared, rate=0.9).row(index, window)
        counted = row["weights"] == 1
        assert not np.isin(row["targets"][counted], special).any()
        drawn = row["tokens"][row["tokens"] != original(row)]
        assert np.isin(drawn, special).sum() == (drawn == MASK).sum()


def test_a_short_row_has_weight_only_where_there_is_text(shared):
    rows = rows_of(shared, rate=0.5)
    row = rows.row(0, flat(shared[0].train)[:5].astype(np.int32))
    assert row["mask"].sum() == 7 and (original(row)[7:] == PAD).all()
    assert row["weights"].sum() == 4 < rows.count
    assert (np.diff(row["positions"]) >= 0).all()
    empty = rows.row(0, np.empty(0, np.int32))
    assert empty["mask"].sum() == 2 and not empty["weights"].any()


def test_80_10_10_and_uniform_choice(shared):
    """40,000 choices: a share p has standard deviation sqrt(p (1 - p) / 40,000), 0.0020 at 0.8 and 0.0015 at
    0.1, and the tolerance is four of them. A random token equals the original one time in 295."""
    rows, window = rows_of(shared, length=102, rate=0.2), np.arange(100, 200, dtype=np.int32)
    drawn = [rows.row(index, window) for index in range(2000)]
    tokens = np.concatenate([row["tokens"][row["positions"]] for row in drawn])
    targets = np.concatenate([row["targets"] for row in drawn])
    assert len(tokens) == 40_000
    masked, kept = np.mean(tokens == MASK), np.mean(tokens == targets)
    assert masked == pytest.approx(0.8, abs=0.008)
    assert kept == pytest.approx(0.1 + 0.1 / 295, abs=0.006)
    random = tokens[(tokens != MASK) & (tokens != targets)]
    assert len(np.unique(random)) == 295
    # A position is chosen in 2,000 rows Binomial(2000, 0.2) times: 400 with deviation 18; five of them for 100.
    chosen = np.bincount(np.concatenate([row["positions"] for row in drawn]), minlength=102)[1:101]
    assert np.abs(chosen - 400).max() < 90


def test_segments_are_swapped_half_the_time(shared):
    """1,000 rows: swapped 500 with deviation 16; four of them. The first segment's length, of an odd 61 tokens,
    must not tell: it is 30 or 31 half the time each, in order or swapped."""
    rows = rows_of(shared, sentence_order=True, types=2)
    window = np.arange(100, 161, dtype=np.int32)
    first_lengths = {0: [], 1: []}
    for index in range(1000):
        row = rows.row(index, window)
        tokens, types = original(row), row["token_types"]
        a, b = tokens[types == 0], tokens[types == 1]
        assert a[0] == CLS and a[-1] == SEP and b[-1] == SEP and len(tokens) == 64 and row["mask"].all()
        halves = [b[:-1], a[1:-1]] if row["order"] else [a[1:-1], b[:-1]]
        np.testing.assert_array_equal(np.concatenate(halves), window)
        first_lengths[int(row["order"])].append(len(a) - 2)
    assert len(first_lengths[1]) == pytest.approx(500, abs=64)
    for lengths in first_lengths.values():
        assert np.mean(lengths) == pytest.approx(30.5, abs=4 * 0.5 / np.sqrt(len(lengths)))


def test_no_sentence_order_without_two_tokens(shared):
    rows = rows_of(shared, sentence_order=True)
    for count in range(6):
        batch = [rows.row(index, np.arange(100, 100 + count, dtype=np.int32)) for index in range(20)]
        assert all(row["order_weights"] == (count >= 2) for row in batch)
        firsts = [np.flatnonzero(original(row) == SEP)[0] - 1 for row in batch]
        assert all(0 < first < count for first in firsts) or count < 2


@settings(deadline=None, max_examples=150)
@given(
    window=WINDOWS,
    index=st.integers(0, 10**9),
    rate=st.sampled_from([0.05, 0.15, 0.5, 0.9]),
    unit=st.sampled_from(UNITS),
    order=st.booleans(),
)
def test_only_text_is_chosen_and_within_the_budget_of_the_row(shared, window, index, rate, unit, order):
    rows = rows_of(shared, rate=rate, unit=unit, sentence_order=order)
    row = rows.row(index, np.array(window[: rows.size], np.int32))
    counted, real = row["weights"] == 1, row["mask"].sum()
    chosen, text = row["positions"][counted], np.flatnonzero(original(row) > MASK)
    assert len(np.unique(chosen)) == len(chosen) and np.isin(chosen, text).all()
    assert (np.diff(row["positions"]) >= 0).all() and (np.diff(counted.astype(int)) <= 0).all()
    assert len(row["positions"]) == rows.count == round(rate * 64)
    assert len(chosen) <= max(1, round(rate * real)) <= rows.count and (real < 64 or len(chosen) <= rows.count)
    if unit == "token":
        assert len(chosen) == min(max(1, round(rate * real)), len(text))


@settings(deadline=None, max_examples=150)
@given(window=WINDOWS, index=st.integers(0, 10**9), unit=st.sampled_from(["word", "span"]), order=st.booleans())
def test_words_are_chosen_whole_and_until_none_fits(shared, window, index, unit, order):
    rows = rows_of(shared, rate=0.3, unit=unit, sentence_order=order)
    row = rows.row(index, np.array(window[: rows.size], np.int32))
    tokens = original(row)
    word = np.cumsum(find_words(shared[0].tokenizer).starts(tokens[None])[0])
    chosen = np.isin(np.arange(64), row["positions"][row["weights"] == 1])
    assert not np.isin(word[chosen], word[~chosen]).any()
    left = max(1, round(0.3 * row["mask"].sum())) - chosen.sum()
    _, sizes = np.unique(word[~chosen & (tokens > MASK)], return_counts=True)
    assert unit == "span" or (sizes > left).all()


@pytest.mark.parametrize("unit", ["word", "span"])
def test_80_10_10_is_decided_for_each_token_of_a_word(shared, unit: str):
    """Words of two tokens, ten a row, 20,000 in 2,000 rows. A share p of n has standard deviation sqrt(p (1 - p) / n):
    of 40,000 tokens 0.0020 at 0.8 and 0.0015 at 0.1, of the words 0.0034 at 0.64; four of them."""
    tokenizer = shared[0].tokenizer
    pair = [tokenizer.token_to_id("Ġa"), tokenizer.token_to_id("z")]
    rows, window = rows_of(shared, length=102, rate=0.2, unit=unit), np.array(pair * 50, np.int32)
    drawn = [rows.row(index, window) for index in range(2000)]
    assert all(row["weights"].all() for row in drawn)
    tokens = np.concatenate([row["tokens"][row["positions"]] for row in drawn])
    targets = np.concatenate([row["targets"] for row in drawn])
    assert len(tokens) == 40_000 and (targets.reshape(-1, 2) == pair).all()
    assert np.mean(tokens == MASK) == pytest.approx(0.8, abs=0.008)
    assert np.mean(tokens == targets) == pytest.approx(0.1 + 0.1 / 295, abs=0.006)
    assert np.mean((tokens.reshape(-1, 2) == MASK).all(axis=1)) == pytest.approx(0.64, abs=0.0136)


@pytest.mark.parametrize("unit", UNITS)
def test_the_share_of_a_corpus_that_is_predicted(shared, unit: str):
    """A word of one token fits unless the budget of 10 is met, and every window of 62 has more than ten. A span may
    begin there with two words or three, so that one row in a hundred, (5/11)^6, might lack one of its ten."""
    rows = rows_of(shared, unit=unit)
    tokens = flat(shared[0].train)
    windows = tokens[: len(tokens) // 62 * 62].reshape(-1, 62).astype(np.int32)
    starts = find_words(shared[0].tokenizer).starts(np.pad(windows, ((0, 0), (0, 1))))
    assert (starts[:, :-1] & starts[:, 1:] & (windows > MASK)).sum(axis=1).min() >= 16
    every = {"index": np.arange(len(windows)), "window": windows, "count": np.full(len(windows), 62)}
    share = rows.batch(every)["weights"].mean()
    assert share > 0.999 if unit == "span" else share == 1


@settings(deadline=None, max_examples=50)
@given(window=WINDOWS, sep_ends=st.booleans())
def test_segments_count_the_documents_that_ended(shared, window, sep_ends):
    rows = dataclasses.replace(rows_of(shared), segments=True)
    if sep_ends:
        rows, window = dataclasses.replace(rows, end=SEP), [SEP if token == END else token for token in window]
    row = rows.row(0, np.array(window, np.int32))
    ended, expected = 0, [0]
    for token in window:
        expected.append(ended)
        ended += token == rows.end
    expected += [expected[-1]] * (64 - len(expected))
    assert row["segments"].tolist() == expected and row["segments"].dtype == np.int32
    assert "segments" not in rows_of(shared).row(0, np.array(window, np.int32))


def test_segments_need_an_end_token_and_nothing_else_does(shared):
    names = ("<|pad|>", "<|cls|>", "<|sep|>", "<|mask|>", "a")
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="a"))
    rows = masked_rows(tokenizer, shared[1](), length=8, stream="test")
    assert rows.row(0, np.full(6, 4, np.int32))["weights"].all()
    with pytest.raises(InputError, match="separated by an end token, but the tokenizer has none of <|endoftext|>"):
        dataclasses.replace(rows, segments=True)
    config = shared[1]()
    config = replace(config, {"data.mask_unit": "word"})
    with pytest.raises(InputError, match="words start is unknown for this tokenizer: it is WordLevel"):
        masked_rows(tokenizer, config, length=8, stream="test")


@pytest.mark.parametrize("unit", UNITS)
def test_a_batch_holds_the_rows_of_its_windows(shared, unit: str):
    """Each as if it were alone: rows of other lengths and numbers of words make no difference."""
    rows = rows_of(shared, unit=unit, sentence_order=True, types=2)
    counts = np.array([61, 0, 1, 2, 30, 61])
    windows = np.where(np.arange(61) < counts[:, None], flat(shared[0].train)[:366].reshape(6, 61), 0).astype(np.int32)
    windows[3, 0] = END
    batch = rows.batch({"index": np.arange(6), "window": windows, "count": counts})
    for index, count in enumerate(counts):
        for name, array in rows.row(index, windows[index, :count]).items():
            np.testing.assert_array_equal(batch[name][index], array, err_msg=name, strict=True)


@pytest.mark.parametrize("unit", UNITS)
def test_draws_are_a_function_of_seed_stream_and_index(shared, unit: str):
    rows, window = rows_of(shared, unit=unit), flat(shared[0].train)[:62].astype(np.int32)
    same = [rows.row(7, window)["tokens"] for _ in range(2)]
    np.testing.assert_array_equal(*same)
    others = [rows.row(8, window), dataclasses.replace(rows, seed=1).row(7, window)]
    others.append(dataclasses.replace(rows, stream="else").row(7, window))
    assert all((same[0] != other["tokens"]).any() for other in others)
    assert all((rows.row(7, window)["positions"] != other["positions"]).any() for other in others)


def test_no_room_and_no_mask_token_are_errors(shared):
    with pytest.raises(InputError, match="a row of 4 tokens has no room for text, expected 5"):
        rows_of(shared, length=4, sentence_order=True)
    _, new_config = shared
    plain = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    with pytest.raises(InputError, match="no cls token"):
        masked_rows(plain, new_config(), length=16, stream="test")

"""Masked rows: by construction, and by distribution."""

import dataclasses

import numpy as np
import pytest
from small_corpus import flat
from tokenizers import Tokenizer, models

from odelm.data.masking import MaskedRows, masked_rows
from odelm.data.tokenizer import special_ids
from odelm.errors import InputError

CLS, SEP, MASK, PAD, END = 2, 3, 4, 0, 1


def rows_of(
    shared, *, length: int = 64, sentence_order: bool = False, rate: float = 0.15, types: int = 0
) -> MaskedRows:
    prepared, new_config = shared
    config = new_config()
    config.model.kind, config.model.sentence_order, config.model.token_types = "encoder", sentence_order, types
    config.data.mask_rate = rate
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
    assert row["weights"].sum() == (flat(shared[0].train)[:5] > 4).sum() < rows.count
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


def test_draws_are_a_function_of_seed_stream_and_index(shared):
    rows, window = rows_of(shared), flat(shared[0].train)[:62].astype(np.int32)
    same = [rows.row(7, window)["tokens"] for _ in range(2)]
    np.testing.assert_array_equal(*same)
    others = [rows.row(8, window), dataclasses.replace(rows, seed=1).row(7, window)]
    others.append(dataclasses.replace(rows, stream="else").row(7, window))
    assert all((same[0] != other["tokens"]).any() for other in others)


def test_no_room_and_no_mask_token_are_errors(shared):
    with pytest.raises(InputError, match="a row of 4 tokens has no room for text, expected 5"):
        rows_of(shared, length=4, sentence_order=True)
    _, new_config = shared
    plain = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    with pytest.raises(InputError, match="no cls token"):
        masked_rows(plain, new_config(), length=16, stream="test")

"""Tokens, words and spans to predict, against choosing one after the other in plain Python."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odelm.data.spans import BEGINS, ENDS, LONGEST_SPAN, PIECE, SingleTokens, Spans, Words

# Token 0 is special, 1 to 3 begin a word, 4 to 6 continue one.
WORDS = Words(
    np.array([BEGINS, BEGINS, BEGINS, BEGINS, PIECE, PIECE, PIECE], np.int8), np.array([ENDS] + [PIECE] * 6, np.int8)
)
LENGTH = 24


def words_of(tokens: list[int]) -> list[range]:
    starts = [i for i, token in enumerate(tokens) if i == 0 or token < 4 or tokens[i - 1] == 0]
    return [range(start, stop) for start, stop in itertools.pairwise([*starts, len(tokens)])]


def one_after_the_other(longest: int, tokens: list[int], draws: list[int], budget: int) -> set[int]:
    words, chosen = words_of(tokens), set()
    text = [tokens[word[0]] != 0 for word in words]
    for number in sorted(filter(text.__getitem__, range(len(words))), key=lambda number: draws[words[number][0]]):
        room = len(list(itertools.takewhile(bool, text[number : number + longest])))
        sums = list(itertools.accumulate(1 / n for n in range(1, room + 1)))
        share = draws[words[number][0]] % 2**32 / 2**32
        count = 1 + sum(share * sums[-1] >= partial for partial in sums[:-1])
        span = {place for word in words[number : number + count] for place in word}
        if not span & chosen and len(span | chosen) <= budget:
            chosen |= span
    return chosen


ROWS = st.lists(
    st.tuples(
        st.lists(st.sampled_from([0, 1, 2, 3, 4, 4, 5, 5, 6]), min_size=LENGTH, max_size=LENGTH),
        st.integers(1, LENGTH),
        st.integers(0, 2**32),
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=300)
@given(rows=ROWS, longest=st.sampled_from([1, 2, 3]))
def test_spans_are_those_chosen_one_after_the_other(rows, longest: int):
    tokens, budget = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    draws = np.stack([np.random.default_rng(row[2]).integers(2**64, size=LENGTH, dtype=np.uint64) for row in rows])
    chosen = Spans(WORDS, longest).choose(tokens, tokens != 0, draws, budget)
    assert chosen.dtype == bool and chosen.shape == tokens.shape
    for got, row, draw in zip(chosen, rows, draws.tolist(), strict=True):
        assert set(np.flatnonzero(got).tolist()) == one_after_the_other(longest, row[0], draw, row[1])


@settings(deadline=None, max_examples=100)
@given(rows=ROWS)
def test_single_tokens_are_those_of_the_smallest_draws(rows):
    tokens, budget = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    draws = np.stack([np.random.default_rng(row[2]).integers(2**64, size=LENGTH, dtype=np.uint64) for row in rows])
    chosen = SingleTokens().choose(tokens, tokens != 0, draws, budget)
    for got, row, draw in zip(chosen, rows, draws.tolist(), strict=True):
        text = sorted((place for place in range(LENGTH) if row[0][place]), key=draw.__getitem__)
        assert set(np.flatnonzero(got).tolist()) == set(text[: row[1]])


PATTERNS = {(3,): 2 / 11, (1, 2): 3 / 11 + 6 / 11 / 3, (1, 1, 1): 6 / 11 * 2 / 3}
"""Of a budget of three words: a first span of 3, or of 2 and then 1, or of 1 and then (of 1 or 2, as 3 is passed over)
2 with 1/3, or two more of 1."""


def runs(chosen: np.ndarray) -> tuple[int, ...]:
    return tuple(sorted(len(list(group)) for taken, group in itertools.groupby(chosen.tolist()) if taken))


def chosen_of(tokens: np.ndarray, *, rows: int, budget: int, longest: int = LONGEST_SPAN) -> np.ndarray:
    batch = np.broadcast_to(tokens, (rows, len(tokens)))
    draws = np.random.default_rng(0).integers(2**64, size=batch.shape, dtype=np.uint64)
    return Spans(WORDS, longest).choose(batch, batch != 0, draws, np.full(rows, budget))


def test_span_lengths_go_as_one_over_n():
    """4,000 rows of 600 words: a share p has standard deviation sqrt(p (1 - p) / 4,000) < 0.0079; four of them,
    and 0.01 for spans that touch (three pairs at most, 2 of 600 places each)."""
    found = [runs(row) for row in chosen_of(np.ones(600, int), rows=4000, budget=3)]
    assert set(found) <= set(PATTERNS)
    for pattern, share in PATTERNS.items():
        assert np.mean([runs == pattern for runs in found]) == pytest.approx(share, abs=0.042)


def test_no_span_is_longer_than_three_words():
    """Runs of four are spans that touch: of at most four, each pair does in 2 of 600 rows, so 2 % is above them all;
    spans of four would be 1/4 of 25/12, 12 %."""
    found = [max(runs(row)) for row in chosen_of(np.ones(600, int), rows=2000, budget=4)]
    assert max(found) <= 4 and np.mean([longest == 4 for longest in found]) < 0.02


def test_the_length_is_drawn_among_what_fits_before_a_special_token():
    """Documents of two words: half of the spans begin with the first word, and a third of those are of two. 4,000
    rows: four standard deviations of sqrt(1/6 5/6 / 4,000), and 0.005 for two spans of one that meet."""
    found = [runs(row) for row in chosen_of(np.tile([1, 1, 0], 200), rows=4000, budget=2)]
    assert np.mean([runs == (2,) for runs in found]) == pytest.approx(1 / 6, abs=0.029)


@pytest.mark.parametrize("longest", [1, LONGEST_SPAN])
def test_the_budget_is_met_where_words_of_one_token_are_left(longest: int):
    """Of 300 words at least 200 are free in the end, each with a candidate of one token with 6/11 or more."""
    tokens = np.where(np.arange(600) % 5 == 4, 4, np.where(np.arange(600) % 7 == 3, 5, 1))
    assert (chosen_of(tokens, rows=200, budget=90, longest=longest).sum(1) == 90).all()


def test_words_of_two_tokens_leave_one_of_an_odd_budget():
    assert (chosen_of(np.tile([1, 4], 100), rows=50, budget=7, longest=1).sum(1) == 6).all()

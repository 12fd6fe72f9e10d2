"""What is masked as one: a token, a word, or a span of words.

A unit chooses the tokens to predict, within a budget for each row. Candidates are taken in random order, and one
that overlaps a chosen one, or does not fit in what is left of the budget, is passed over.

Whole words: https://github.com/google-research/bert, "Whole Word Masking models". Spans: Joshi et al. 2020 (arXiv
1907.10529, section 3.1) and Lan et al. 2020 (arXiv 1909.11942, section 3.1).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from odelm.data.words import Words, find_words

LONGEST_SPAN = 3


class Unit(Protocol):
    """Chooses what to predict."""

    def choose(self, tokens: np.ndarray, maskable: np.ndarray, draws: np.ndarray, budget: np.ndarray) -> np.ndarray:
        """Returns bool (B, L), True at the tokens to predict: at most `budget` int (B,) of a row.

        They are among those of `tokens` (B, L) that are `maskable`, bool (B, L); `draws` are random uint64 (B, L).
        """
        ...


def make_unit(name: str, tokenizer: Tokenizer) -> Unit:
    """Returns the unit of a `data.mask_unit`; InputError if it needs words that the tokenizer does not tell."""
    if name == "token":
        return Tokens()
    return Spans(find_words(tokenizer), longest=1 if name == "word" else LONGEST_SPAN)


class Tokens:
    """Every token for itself."""

    def choose(self, tokens: np.ndarray, maskable: np.ndarray, draws: np.ndarray, budget: np.ndarray) -> np.ndarray:
        order = _in_order(maskable, draws)
        chosen = np.zeros(tokens.shape, bool)
        np.put_along_axis(chosen, order, np.arange(order.shape[1]) < budget[:, None], axis=1)
        return chosen & maskable


@dataclass(frozen=True, eq=False)
class Spans:
    """Spans of n whole words, n from 1 to `longest` with probability proportional to 1 / n.

    None holds a token that is not maskable: where m < `longest` words are left before one, n is drawn from 1 to m.
    """

    words: Words
    longest: int

    def choose(self, tokens: np.ndarray, maskable: np.ndarray, draws: np.ndarray, budget: np.ndarray) -> np.ndarray:
        length = tokens.shape[1]
        starts = self.words.starts(tokens)
        heads = _in_order(starts & maskable, draws)
        bounds = _bounds(starts, heads, self.longest)
        counts = self._counts(starts & maskable, bounds[:-1], np.take_along_axis(draws, heads, axis=1))
        stops = np.take_along_axis(bounds, counts[None], axis=0)[0]
        # A row with fewer candidates than another ends in places that are none: they fit nowhere.
        sizes = np.where(counts > 0, stops - heads, length + 1)
        number = np.arange(self.longest)[:, None, None]
        taken = _take(np.where(number < counts, bounds[:-1], heads), sizes, budget, length)
        heads_of_all = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
        return np.take_along_axis(taken, heads_of_all, axis=1)

    def _counts(self, candidates: np.ndarray, bounds: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Returns how many words, int (B, C), to take from each head on: 0 where that is no candidate.

        `bounds` (longest, B, C) is where the words from each head on begin. The length takes the low bits of a draw,
        as the order takes the high ones, and inverts the sum of 1 / n.
        """
        inside = np.pad(candidates, ((0, 0), (0, 1)))
        possible = np.logical_and.accumulate([np.take_along_axis(inside, bound, axis=1) for bound in bounds]).sum(0)
        sums = np.concatenate([[0], np.cumsum(1 / np.arange(1, self.longest + 1))])
        share = (draws & np.uint64(2**32 - 1)) * 2.0**-32
        return np.where(possible > 0, np.searchsorted(sums, share * sums[possible], side="right"), 0)


def _in_order(candidates: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Returns the places int (B, C) of `candidates` bool (B, L) by their draws, smallest first, and C the most of a
    row; rows with fewer end in other places."""
    ranks = np.where(candidates, draws >> np.uint64(1), np.uint64(2**64 - 1))
    return np.argsort(ranks, axis=1)[:, : candidates.sum(1).max(initial=0)]


def _bounds(starts: np.ndarray, heads: np.ndarray, count: int) -> np.ndarray:
    """Returns the places int (count + 1, B, C) where the words from each of `heads` (B, C) on begin; L is past all."""
    length = starts.shape[1]
    places = np.where(starts, np.arange(length), length)
    at_or_after = np.minimum.accumulate(places[:, ::-1], axis=1)[:, ::-1]
    after = np.pad(at_or_after[:, 1:], ((0, 0), (0, 2)), constant_values=length)
    bounds = [heads]
    for _ in range(count):
        bounds.append(np.take_along_axis(after, bounds[-1], axis=1))
    return np.stack(bounds)


def _take(covered: np.ndarray, sizes: np.ndarray, budget: np.ndarray, length: int) -> np.ndarray:
    """Returns which words are taken, bool (B, L) at their first tokens.

    `covered` int (n, B, C) says where the words of each candidate begin and `sizes` int (B, C) how many tokens it
    has. Candidates are taken one after the other, over all rows at once.
    """
    rows = np.arange(len(budget))
    taken, left = np.zeros(len(budget) * length, bool), budget.copy()
    for places, size in zip(np.moveaxis(covered, 2, 0) + rows * length, sizes.T, strict=True):
        before = taken[places]
        fits = (size <= left) & ~before.any(axis=0)
        taken[places] = before | fits
        left -= size * fits
        if not left.any():
            break
    return taken.reshape(-1, length)

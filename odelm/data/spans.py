"""What is masked as a whole (a token, a word, or a span of words), and where words start among tokens.

A mask unit chooses the tokens to predict, within a budget for each row. It takes candidates in random order and skips
one that overlaps a chosen one, or does not fit into the rest of the budget.

Whole words: https://github.com/google-research/bert, "Whole Word Masking models". Spans: Joshi et al. 2020 (arXiv
1907.10529, section 3.1) and Lan et al. 2020 (arXiv 1909.11942, section 3.1).

Where a word starts depends only on neighbouring tokens, and on the kind of tokenizer, of which three are supported:
byte-level BPE (Radford et al. 2019, section 2.2), WordPiece (Devlin et al. 2019, arXiv 1810.04805) and SentencePiece
(Kudo and Richardson 2018, arXiv 1808.06226). A word is what the tokenizer splits text into before it looks at its
vocabulary, with two exceptions in byte-level BPE: a token of white space only is a word, and letters after an English
contraction belong to it (the words of `it'sx` are `it` and `'sx`).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from odelm.errors import InputError
from odelm.tokenizer import special_ids

LONGEST_SPAN = 3

BEGINS, ENDS = -1, -2
"""`first` of a token that continues no word; `last` of a token that no token continues."""

PIECE, LETTER, NUMBER, OTHER, SPACE = range(5)

Classes = tuple[int, int]
"""The classes of a token's first and of its last character."""


@dataclass(frozen=True, eq=False)
class Words:
    """The classes of all tokens: token t after token p continues the word of p exactly if `first[t] == last[p]`."""

    first: np.ndarray
    """int8 (V,)."""
    last: np.ndarray
    """int8 (V,)."""

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Returns bool (B, L), True where a word starts in the rows of `tokens` (B, L); the first place is one."""
        starts = np.ones(tokens.shape, bool)
        np.not_equal(self.first[tokens[:, 1:]], self.last[tokens[:, :-1]], out=starts[:, 1:])
        return starts


def find_words(tokenizer: Tokenizer) -> Words:
    """Returns where words start among the tokens of `tokenizer`.

    Tokens outside the tokenizer's model, special or added, are words of their own. Raises InputError if the tokenizer
    is of none of the three kinds.
    """
    classes = _classes_of(tokenizer)
    vocabulary = tokenizer.get_vocab()
    alone = {*tokenizer.get_added_tokens_decoder(), *special_ids(tokenizer).tolist()}
    first = np.full(max(vocabulary.values()) + 1, BEGINS, np.int8)
    last = np.full_like(first, ENDS)
    for token, number in vocabulary.items():
        if number not in alone:
            first[number], last[number] = classes(token)
    return Words(first, last)


def _classes_of(tokenizer: Tokenizer) -> Callable[[str], Classes]:
    """Returns a function from the text of a token to its (first, last) character class."""
    parts = json.loads(tokenizer.to_str())
    model, steps = parts["model"], [*_steps(parts["pre_tokenizer"]), *_steps(parts["decoder"])]
    marks = [mark for step in steps if (mark := _space_mark(step))]
    if prefix := model.get("continuing_subword_prefix"):
        return lambda token: (PIECE if token.startswith(prefix) else BEGINS, PIECE)
    if any(step["type"] == "ByteLevel" for step in steps) and not model.get("end_of_word_suffix"):
        return _byte_classes()
    if marks:
        return lambda token: (BEGINS if token.startswith(marks[0]) else PIECE, PIECE)
    raise InputError(
        f"where words start is unknown for this tokenizer: it is {model['type']} without a byte-level alphabet, a "
        "prefix such as '##' or a mark such as '\u2581' for the space; use another one, or data.mask_unit='token'"
    )


def _steps(part: dict | None) -> Iterator[dict]:
    """Yields the steps of a pre-tokenizer or decoder, those of a sequence one by one."""
    if part and part["type"] == "Sequence":
        for step in part.get("pretokenizers") or part.get("decoders") or []:
            yield from _steps(step)
    elif part:
        yield part


def _space_mark(step: dict) -> str | None:
    """Returns the character that a SentencePiece step uses for the space, else None.

    The step is Metaspace, or, as written before 2023, a decoder that replaces the character.
    """
    if step["type"] == "Metaspace":
        return step["replacement"]
    if step["type"] == "Replace" and step["content"] == " ":
        return step["pattern"].get("String")
    return None


def _byte_classes() -> Callable[[str], Classes]:
    """Returns the classes of tokens whose characters represent bytes, in GPT-2's alphabet.

    Printable bytes represent themselves; the others are, in order, the characters from U+0100 on.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [character for character in alphabet if ord(character) < 256]
    others = sorted(set(range(256)) - {ord(character) for character in printable})
    numbers = {character: ord(character) for character in printable} | dict(
        zip(alphabet[len(printable) :], others, strict=True)
    )
    kinds = {character: _byte_class(number) for character, number in numbers.items()}

    def classes(token: str) -> Classes:
        first, last = kinds.get(token[:1], OTHER), kinds.get(token[-1:], OTHER)
        return BEGINS if first == SPACE else first, last

    return classes


def _byte_class(number: int) -> int:
    """Returns the class of a byte; bytes of text that is not ASCII count as letters."""
    byte = bytes([number])
    if number >= 128 or byte.isalpha():
        return LETTER
    return NUMBER if byte.isdigit() else SPACE if byte.isspace() else OTHER


class MaskUnit(Protocol):
    """Chooses what to predict."""

    def choose(self, tokens: np.ndarray, maskable: np.ndarray, draws: np.ndarray, budget: np.ndarray) -> np.ndarray:
        """Returns bool (B, L), True at the tokens to predict: at most `budget` int (B,) in a row.

        Only tokens of `tokens` (B, L) that are `maskable`, bool (B, L), are chosen; `draws` are random uint64 (B, L).
        """
        ...


def make_unit(name: str, tokenizer: Tokenizer) -> MaskUnit:
    """Returns the unit named by `data.mask_unit`; InputError if it needs words and the tokenizer's are unknown."""
    if name == "token":
        return SingleTokens()
    return Spans(find_words(tokenizer), longest=1 if name == "word" else LONGEST_SPAN)


class SingleTokens:
    """Each token on its own."""

    def choose(self, tokens: np.ndarray, maskable: np.ndarray, draws: np.ndarray, budget: np.ndarray) -> np.ndarray:
        order = _in_order(maskable, draws)
        chosen = np.zeros(tokens.shape, bool)
        np.put_along_axis(chosen, order, np.arange(order.shape[1]) < budget[:, None], axis=1)
        return chosen & maskable


@dataclass(frozen=True, eq=False)
class Spans:
    """Spans of n whole words, n from 1 to `longest` with probability proportional to 1 / n.

    No span holds a token that is not maskable: where m < `longest` words are left before such a token, n is drawn from
    1 to m.
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
        # Where a row has fewer candidates than another, its last places are no candidates: they fit nowhere.
        sizes = np.where(counts > 0, stops - heads, length + 1)
        number = np.arange(self.longest)[:, None, None]
        taken = _take(np.where(number < counts, bounds[:-1], heads), sizes, budget, length)
        heads_of_all = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
        return np.take_along_axis(taken, heads_of_all, axis=1)

    def _counts(self, candidates: np.ndarray, bounds: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Returns how many words, int (B, C), to take from each head on: 0 where the head is no candidate.

        `bounds` (longest, B, C) says where the words from each head on begin. The number comes from the low bits of a
        draw, because the order uses the high ones, by inverting the sum of 1 / n.
        """
        inside = np.pad(candidates, ((0, 0), (0, 1)))
        possible = np.logical_and.accumulate([np.take_along_axis(inside, bound, axis=1) for bound in bounds]).sum(0)
        sums = np.concatenate([[0], np.cumsum(1 / np.arange(1, self.longest + 1))])
        share = (draws & np.uint64(2**32 - 1)) * 2.0**-32
        return np.where(possible > 0, np.searchsorted(sums, share * sums[possible], side="right"), 0)


def _in_order(candidates: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Returns the places int (B, C) of `candidates` bool (B, L), smallest draw first. C is the most candidates in a
    row; rows with fewer end in other places."""
    ranks = np.where(candidates, draws >> np.uint64(1), np.uint64(2**64 - 1))
    return np.argsort(ranks, axis=1)[:, : candidates.sum(1).max(initial=0)]


def _bounds(starts: np.ndarray, heads: np.ndarray, count: int) -> np.ndarray:
    """Returns the places int (count + 1, B, C) where the words from each of `heads` (B, C) on begin; L if none is
    left."""
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

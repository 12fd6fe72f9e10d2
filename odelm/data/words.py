"""Where words start among tokens, told from neighbouring tokens alone.

Three kinds of tokenizer are understood: byte-level BPE (Radford et al. 2019, section 2.2), WordPiece (Devlin et al.
2019, arXiv 1810.04805) and SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226). A word is what the tokenizer
splits text into before it looks at its vocabulary, but for two things of byte-level BPE: a token of white space alone
is a word, and letters after an English contraction belong to it (of `it'sx` the words are `it` and `'sx`).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from odelm.data.tokenizer import special_ids
from odelm.errors import InputError

BEGINS, ENDS = -1, -2
"""As `first`, of a token that continues nothing; as `last`, of one that nothing continues."""

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

    The tokens that are no part of its model, special or added, are words of their own. Raises InputError if the
    tokenizer is of another kind than the three.
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
    """Returns what tells the classes of a token's text, by the kind of the tokenizer."""
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
        f"the tokenizer's words cannot be told: it is {model['type']} without a byte-level alphabet, a prefix such as "
        "'##' or a mark such as '\u2581' for the space; use another one, or data.mask_unit='token'"
    )


def _steps(part: dict | None) -> Iterator[dict]:
    """Yields the steps of a pre-tokenizer or decoder, those of a sequence one by one."""
    if part and part["type"] == "Sequence":
        for step in part.get("pretokenizers") or part.get("decoders") or []:
            yield from _steps(step)
    elif part:
        yield part


def _space_mark(step: dict) -> str | None:
    """Returns the character that stands for the space if the step is SentencePiece's, as written since or before 2023:
    Metaspace, or a decoder that replaces it."""
    if step["type"] == "Metaspace":
        return step["replacement"]
    if step["type"] == "Replace" and step["content"] == " ":
        return step["pattern"].get("String")
    return None


def _byte_classes() -> Callable[[str], Classes]:
    """Returns the classes of tokens whose characters stand for bytes, in GPT-2's alphabet.

    Printable bytes stand for themselves; the others are, in order, the characters from U+0100 on.
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
    """Returns the class of a byte; those of text that is not ASCII count as letters."""
    byte = bytes([number])
    if number >= 128 or byte.isalpha():
        return LETTER
    return NUMBER if byte.isdigit() else SPACE if byte.isspace() else OTHER

"""A byte-level BPE tokenizer, trained or loaded, and the ids of its special tokens."""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from odelm.arguments import of_class
from odelm.errors import InputError

SPECIAL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|cls|>", "<|sep|>", "<|mask|>")
"""The special tokens of the tokenizers trained here, with the ids 0 to 4."""

NAMES = {
    "pad": ("<|pad|>", "[PAD]", "<pad>"),
    "end": ("<|endoftext|>", "</s>", "[SEP]", "<eos>", "<|end_of_text|>"),
    "cls": ("<|cls|>", "[CLS]", "<s>"),
    "sep": ("<|sep|>", "[SEP]", "</s>"),
    "mask": ("<|mask|>", "[MASK]", "<mask>"),
}
"""The names of each role, in this library's tokenizers and in others', in order of preference."""

_LONG_RUN = re.compile(r"\S{1000}|\s{1000}")
"""A run that is no word: training takes time in the square of its length, and learns nothing from it."""
PIECE = 1 << 16
"""Characters after which a long document is cut at the next end of a word."""
_WORD_END = re.compile(r"\S(?=\s)")


def train(documents: Iterable[str], *, vocab_size: int, max_bytes: int) -> Tokenizer:
    """Returns a byte-level BPE of at most `vocab_size` tokens, trained on the first `max_bytes` of `documents`.

    Raises InputError if `vocab_size` cannot hold the 256 bytes and the special tokens.
    """
    check_trainable(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(documents, max_bytes), trainer)
    return tokenizer


def check_trainable(vocab_size: int) -> None:
    """Raises InputError if `vocab_size` cannot hold the 256 bytes and the special tokens."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise InputError(f"the vocabulary is {vocab_size} tokens, expected {smallest} or more: 256 bytes, 5 special")


def load(path: str | Path) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face `tokenizer.json`; InputError if it is missing or is not one."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"the tokenizer {path} is not a file; expected the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path} is not a tokenizer.json of the tokenizers library ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_size(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer; InputError if it has ids that a model of `vocab_size` tokens does not."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        raise InputError(
            f"the tokenizer has {needed} tokens, more than model.vocab_size {vocab_size}; "
            f"set model.vocab_size to {needed} or more, or use a smaller tokenizer"
        )
    return tokenizer


def special_id(tokenizer: Tokenizer, role: str) -> int:
    """Returns the id of the token for `role` ("pad", "end", "cls", "sep", "mask"); InputError if there is none."""
    number = find_id(tokenizer, role)
    if number is None:
        raise InputError(
            f"the tokenizer has no {role} token; expected one of {', '.join(NAMES[role])}: use another one"
        )
    return number


def end_id(tokenizer: Tokenizer, name: str = "") -> int:
    """Returns the id of the token that ends a document: of that name, or if it is empty of the role "end".

    Raises InputError if the tokenizer lacks it.
    """
    if not name:
        return special_id(tokenizer, "end")
    number = tokenizer.token_to_id(name)
    if number is None:
        raise InputError(f"the tokenizer has no token {name!r}, which data.end_token says ends a document")
    return number


def special_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the sorted ids, int64 (n,), of all tokens that do not represent text."""
    marked = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    named = {number for role in NAMES if (number := find_id(tokenizer, role)) is not None}
    return np.array(sorted(marked | named), np.int64)


def find_id(tokenizer: Tokenizer, role: str) -> int | None:
    """Returns the id of the token for `role`, as `special_id` does, or None if there is none."""
    numbers = (tokenizer.token_to_id(name) for name in NAMES[role])
    return next((number for number in numbers if number is not None), None)


def encode(
    tokenizer: Tokenizer, documents: Iterable[str], *, end: str = "", batch_bytes: int = 1 << 22
) -> Iterator[np.ndarray]:
    """Yields the token ids of `documents`, uint32, each followed by the end token, in runs of bounded size.

    `end` is the name of that token, as in `end_id`. Text that spells a special token is text. A long document is
    encoded in pieces cut where a word ends, so that memory is bounded, if the tokenizer is known to treat the text
    before and after such a place separately (`cuts_at_words`); else as a whole. Either way its tokens are the
    tokenizer's.
    """
    last_token = np.array([end_id(tokenizer, end)], np.uint32)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    size = PIECE if cuts_at_words(tokenizer) else None
    for pieces, ends in _batches(documents, batch_bytes, _spelled(tokenizer), size):
        encodings = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        parts = ((np.array(item.ids, np.uint32), last_token[:last]) for item, last in zip(encodings, ends, strict=True))
        yield np.concatenate([part for pair in parts for part in pair])


def encode_each(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Returns the token ids of each text, without special tokens; text that spells a special token is text."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def cuts_at_words(tokenizer: Tokenizer) -> bool:
    """Returns whether text may be cut between a word and the space after it, and each part encoded on its own.

    Proved for normalisers that change one character at a time, and for pre-tokenisers that end a piece at every such
    place whatever precedes it: that of GPT-2, whose pieces may begin with a space but not end with one unless they are
    only spaces, and those that drop spaces. Added tokens that are not special might span the place.
    """
    settings = json.loads(tokenizer.to_str())
    normalizer, pre = settings["normalizer"] or {}, settings["pre_tokenizer"] or {}
    gpt2 = pre.get("type") == "ByteLevel" and pre["use_regex"] and not pre["add_prefix_space"]
    plain = all(token["special"] for token in settings["added_tokens"])
    by_character = normalizer.get("type") in (None, "BertNormalizer", "Lowercase", "NFC", "NFD", "StripAccents")
    return plain and by_character and (gpt2 or pre.get("type") in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit"))


def decode_after(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """Returns the text of `tokens` as what continues the text of `prompt`.

    Decoded without the prompt they may lose their first space, or the bytes of a character that both share.
    """
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    return whole[len(os.path.commonprefix([before, whole])) :]


def _spelled(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Returns a pattern that finds the special tokens that the model itself would read in text that spells them.

    A Unigram has them among its pieces; the other models never put them together.
    """
    if not isinstance(tokenizer.model, models.Unigram):
        return None
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return re.compile("|".join(map(re.escape, names))) if names else None


def _batches(
    documents: Iterable[str], size: int, spelled: re.Pattern[str] | None, piece_size: int | None
) -> Iterator[tuple[list[str], list[bool]]]:
    """Groups pieces of documents to about `size` characters, with a flag at the last piece of each document."""
    pieces, ends, total = [], [], 0
    for document in documents:
        for piece, last in [(document, True)] if piece_size is None else _pieces(document, piece_size):
            # Cut within text that spells a special token, so that it stays text.
            cuts = [0, *(found.start() + 1 for found in spelled.finditer(piece)), len(piece)] if spelled else [0, None]
            parts = [piece[start:stop] for start, stop in itertools.pairwise(cuts)]
            pieces.extend(parts)
            ends.extend([*[False] * (len(parts) - 1), last])
            total += len(piece)
            if total >= size:
                yield pieces, ends
                pieces, ends, total = [], [], 0
    if pieces:
        yield pieces, ends


def _pieces(text: str, size: int = PIECE) -> Iterator[tuple[str, bool]]:
    start = 0
    while cut := _WORD_END.search(text, start + size):
        yield text[start : cut.end()], False
        start = cut.end()
    yield text[start:], True


def _first_bytes(documents: Iterable[str], count: int) -> Iterator[str]:
    for document in documents:
        data = document.encode()[:count]
        for piece, _ in _pieces(data.decode(errors="ignore")):
            cuts = [0, *(run.end() for run in _LONG_RUN.finditer(piece)), len(piece)]
            yield from (piece[start:stop] for start, stop in itertools.pairwise(cuts))
        count -= len(data)
        if count <= 0:
            return


def checked(tokenizer: Any) -> Tokenizer | None:
    """Returns the tokenizer, or None if there is none; InputError for an object of another library, or no tokenizer."""
    if tokenizer is not None:
        expected = "a tokenizers.Tokenizer, such as odelm.load returns (of transformers: its backend_tokenizer)"
        of_class("tokenizer", tokenizer, Tokenizer, expected)
    return tokenizer


def needed(tokenizer: Tokenizer | None) -> Tokenizer:
    """Returns the tokenizer; InputError if there is none."""
    if tokenizer is None:
        raise InputError(
            "the model has no tokenizer.json that fits it, which text needs: save one in its folder "
            "(a fast tokenizer's save_pretrained in transformers)"
        )
    return tokenizer

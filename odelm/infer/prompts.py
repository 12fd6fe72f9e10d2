"""Prompts as token ids, checked, and padded to lengths for which programs are there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from odelm.config import ModelConfig
from odelm.errors import InputError

Prompts = Sequence[str] | Sequence[Sequence[int]]
SMALLEST_BUCKET = 16


def read(prompts: Any, tokenizer: Tokenizer | None, config: ModelConfig) -> list[list[int]]:
    """Returns the token ids of each prompt, a string or ids; InputError for one that the model cannot take."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
        raise InputError("prompts is a single prompt, expected a list of them: put it in brackets")
    if not len(prompts):
        raise InputError("prompts is empty: give at least one")
    return [_ids(prompt, tokenizer, config) for prompt in prompts]


def check_room(given: list[list[int]], new_tokens: int, config: ModelConfig) -> None:
    """Raises InputError if the longest prompt and the new tokens are more than the model's positions."""
    longest, limit = max(map(len, given)), config.max_length
    if new_tokens < 1:
        raise InputError(f"new_tokens is {new_tokens}, expected at least 1")
    if longest + new_tokens > limit:
        raise InputError(
            f"the prompt's {longest} tokens and {new_tokens} new ones are more than model.max_length {limit}; "
            f"ask for {max(limit - longest, 0)} or fewer"
        )


def padded(given: list[list[int]], new_tokens: int, limit: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the prompts padded at their ends, int32 (B, P), their lengths, int32 (B,), and room for new tokens.

    Both P and the room are powers of two where the `limit` of positions allows it.
    """
    longest = max(map(len, given))
    width = min(bucket(longest), limit)
    room = min(bucket(new_tokens), limit + 1 - width)
    if room < new_tokens:
        width, room = longest, new_tokens
    rows = np.zeros((len(given), width), np.int32)
    for row, ids in zip(rows, given, strict=True):
        row[: len(ids)] = ids
    return rows, np.array([len(ids) for ids in given], np.int32), room


def bucket(length: int) -> int:
    """Returns the power of two from `length` on, at least `SMALLEST_BUCKET`."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _ids(prompt: str | Sequence[int], tokenizer: Tokenizer | None, config: ModelConfig) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("a prompt is a string, but the generator has no tokenizer: give lists of token ids")
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise InputError("the prompt has no tokens: give at least one character")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise InputError(f"a prompt has the ids {min(ids)} to {max(ids)}, expected 0 to {config.vocab_size - 1}")
    return ids

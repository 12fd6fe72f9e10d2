"""Converts texts to token ids, checks them, and pads them to a few lengths, for which programs are compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer
from tokenizers import Tokenizer

from odelm.arguments import listed, whole
from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.files import whole_characters
from odelm.models.loss import Batch

Prompts = Sequence[str] | Sequence[Sequence[int]]
SMALLEST_BUCKET = 16


def read(prompts: Any, tokenizer: Tokenizer | None, config: ModelConfig) -> list[list[int]]:
    """Returns the token ids of each prompt, a string or ids; InputError for one that the model cannot take."""
    encode = tokenizer and (lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    return read_texts("prompt", prompts, encode, config)


def read_texts(
    name: str, texts: Any, encode: Callable[[str], list[int]] | None, config: ModelConfig
) -> list[list[int]]:
    """Returns the token ids of each text; errors name a text by `name` and its number.

    `encode` tokenises a string; None if there is no tokenizer. Raises InputError for a single text in place of a list,
    for texts without tokens, and for ids that are not whole numbers or have no embedding.
    """
    return [_ids(f"{name} {number}", text, encode, config) for number, text in enumerate(list_of(name, texts))]


def list_of(name: str, texts: Any) -> list[Any]:
    """Returns texts as a list, which an iterator has only once; InputError for a single text, and for what is none."""
    single = isinstance(texts, str)
    found = [] if single else listed(f"{name}s", texts, "a list of strings or of lists of token ids")
    if isinstance(texts, Tracer) or any(isinstance(text, Tracer) for text in found):
        raise InputError(
            f"{name}s are arguments of a jitted function: call odelm.infer.decode.prefill and advance there, or the "
            "model itself"
        )
    if single or isinstance(found[0], int | np.integer):
        raise InputError(f"{name}s is a single {name}, expected a list of them: put it in brackets")
    return found


def check_room(given: list[list[int]], new_tokens: int, config: ModelConfig, window: int | None = None) -> None:
    """Raises InputError if the longest prompt and the new tokens are more than the model's positions; with a window
    only if the prompt is."""
    lengths, limit = [len(ids) for ids in given], config.max_length
    longest, most = max(lengths), limit - whole("new_tokens", new_tokens)
    if longest <= (most if window is None else limit):
        return
    prompt = "the prompt" if len(given) == 1 else f"prompt {lengths.index(longest)}"
    if window is not None:
        raise InputError(
            f"{prompt} has {longest} tokens, more than model.max_length {limit}: shorten it to {limit} or fewer"
        )
    if longest < limit:
        advice = f"ask for {limit - longest} new tokens or fewer"
    else:
        advice = f"shorten it to {most} tokens or fewer" if most > 0 else "shorten it, and ask for fewer new tokens"
    raise InputError(
        f"{prompt}'s {longest} tokens and {new_tokens} new ones are more than model.max_length {limit}: {advice}"
    )


def padded(given: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts padded at their ends to a width P, int32 (B, P), and their lengths, int32 (B,)."""
    rows = np.zeros((len(given), width), np.int32)
    for row, ids in zip(rows, given, strict=True):
        row[: len(ids)] = ids
    return rows, np.array([len(ids) for ids in given], np.int32)


def sizes(longest: int, new_tokens: int, limit: int, window: int | None = None) -> tuple[int, int]:
    """Returns the padded length of prompts, and the room for new tokens: powers of two where a `limit` of positions
    allows it. With a window the limit is only that of the prompts.

    Near the limit the prompts get all positions that the new tokens' power of two leaves. If these are too few, the
    prompts get a multiple of `SMALLEST_BUCKET`, and the new tokens get the rest. So there are few sizes everywhere.
    """
    width, room = bucket(longest), bucket(new_tokens)
    if window is not None:
        return min(width, limit), room
    if width + room <= limit + 1:
        return width, room
    if longest + room <= limit + 1:
        return limit + 1 - room, room
    width = min(-(-longest // SMALLEST_BUCKET) * SMALLEST_BUCKET, limit + 1 - new_tokens)
    return width, limit + 1 - width


def power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least `number`."""
    return 1 << (int(number) - 1).bit_length()


def bucket(length: int) -> int:
    """Returns the smallest power of two that is at least `length` and at least `SMALLEST_BUCKET`."""
    return max(SMALLEST_BUCKET, power_of_two(length))


def _ids(name: str, text: Any, encode: Callable[[str], list[int]] | None, config: ModelConfig) -> list[int]:
    if isinstance(text, str):
        if encode is None:
            raise InputError(f"{name} is a string, but there is no tokenizer: give lists of token ids")
        ids = np.asarray(encode(whole_characters(name, text)), np.int64)
    else:
        try:
            ids = np.asarray(text)
        except ValueError as error:  # lists of several lengths
            raise InputError(f"{name} is {text!r:.60}, expected a string or a list of token ids") from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InputError(f"{name} is {ids.dtype} of shape {ids.shape}, expected a string or a list of token ids")
    if not ids.size:
        raise InputError(f"{name} has no tokens: give at least one, or leave it out")
    if not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise InputError(f"{name} has the ids {ids.min()} to {ids.max()}, expected 0 to {config.vocab_size - 1}")
    return ids.tolist()


def some_tokens(held_out: Sequence[Batch], model: ModelConfig, *, batch: int, length: int) -> np.ndarray:
    """Returns tokens to time with, int32 (batch, length): the beginnings of held-out sequences, or random ids if no
    sequence is long enough."""
    whole = [np.asarray(data["tokens"])[_reach(data, length)] for data in held_out if data["tokens"].shape[1] >= length]
    rows = np.concatenate(whole) if whole else np.empty((0, length), np.int32)
    if not len(rows):
        return np.random.default_rng(0).integers(0, model.vocab_size, (batch, length)).astype(np.int32)
    return rows[np.arange(batch) % len(rows), :length].astype(np.int32)


def _reach(data: Batch, length: int) -> np.ndarray:
    """Returns which rows of a batch have at least `length` tokens, bool (B,)."""
    if "mask" in data:
        return np.asarray(data["mask"]).sum(axis=1) >= length
    return np.asarray(data["weights"])[:, length - 1] > 0

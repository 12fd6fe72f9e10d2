"""What generation returns: the tokens that follow a prompt, and their text."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from tokenizers import Tokenizer

from odelm.infer.stopping import certain, cut
from odelm.tokenizer import decode_after


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt."""

    tokens: list[int]
    logprobs: list[float]
    """The log-probability of each token under the model, before temperature, filters and penalty."""
    text: str | None
    """None without a tokenizer."""
    evaluations: list[int] | None = None
    """How often the blocks were evaluated for each token; None without early exits."""


def read_rows(
    tokens: jax.Array, logprobs: jax.Array, evaluations: jax.Array | None, counts: np.ndarray, *, end: int
) -> list[Continuation]:
    """Returns continuations without texts: the first `counts` (B,) tokens of each row of arrays (B, N), up to but
    without the token `end`."""
    found, all_tokens, all_logprobs = [], np.asarray(tokens), np.asarray(logprobs)
    spent = None if evaluations is None else np.asarray(evaluations)
    for row, count in enumerate(counts):
        ids = all_tokens[row, :count].tolist()
        ids = ids[: ids.index(end)] if end in ids else ids
        n = len(ids)
        evaluated = None if spent is None else spent[row, :n].tolist()
        found.append(Continuation(ids, all_logprobs[row, :n].tolist(), None, evaluated))
    return found


def with_texts(
    found: Sequence[Continuation],
    prompts: Sequence[list[int]],
    tokenizer: Tokenizer,
    ended: np.ndarray,
    stop: Sequence[str],
    *,
    last: bool,
) -> tuple[list[Continuation], np.ndarray]:
    """Returns continuations with their texts, and which have ended, bool (B,): those marked in `ended`, and those whose
    text has one of the strings `stop`. A text that may continue omits what a later token could take back, unless this
    call is the `last`."""
    whole, ended = [], ended.copy()
    for row, (one, prompt) in enumerate(zip(found, prompts, strict=True)):
        text, stopped = cut(decode_after(tokenizer, prompt, one.tokens), stop)
        ended[row] |= stopped
        whole.append(dataclasses.replace(one, text=text if ended[row] or last else certain(text, stop)))
    return whole, ended

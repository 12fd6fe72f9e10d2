"""Converts texts into what a model is to predict: rows of tokens, and the places in them where a token is predicted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from odelm.errors import InputError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row that a model reads, and what it should predict there."""

    tokens: Sequence[int]
    """What is read; at most as many as the model's positions."""
    places: Sequence[int]
    """Where in `tokens` something is predicted."""
    targets: Sequence[int]
    """The right token at each of the places: the next token for a decoder, the masked one for an encoder."""


def texts_of(context: str, continuation: str) -> tuple[str, str]:
    """Returns the texts of a pair that `encode_pair` tokenises: the context without the spaces at its end, and both."""
    return context.rstrip(), context + continuation


def encode_pair(encode: Encode, context: str, continuation: str, start: int) -> tuple[list[int], list[int]]:
    """Returns the token ids of a context and of its continuation, neither of them empty.

    Both are tokenised as one text, which is split where the tokens of the context end; spaces at the end of the context
    are moved to the continuation, because most tokenizers join a space to the word after it. An empty context becomes
    the token `start`, which ends a preceding text. All this is as in lm-eval (`TemplateLM.loglikelihood`, version
    0.4.13). Raises InputError for a continuation without tokens.
    """
    kept, both = texts_of(context, continuation)
    before, whole = (encode(kept) if kept else []), encode(both)
    after = whole[len(before) :] or encode(continuation)
    if not after:
        raise InputError(f"the text {continuation!r:.60} has no tokens, so that nothing is predicted: leave it out")
    if before:
        return before, after
    return (after[:1], after[1:]) if after[0] == start and len(after) > 1 else ([start], after)


def windows(context: Sequence[int], continuation: Sequence[int], limit: int) -> list[Prediction]:
    """Returns rows of at most `limit` tokens that predict each token of the continuation once.

    Mostly that is one row, whose context is cut from the left if it is too long. A continuation of more than `limit`
    tokens takes several: each predicts up to `limit` tokens given at least the one before, and the last one has as much
    context as fits. These are the windows of lm-eval's `get_rolling_token_windows` with `context_len=1`.
    """
    whole = [*context, *continuation]
    found, done = [], len(context)
    while done < len(whole):
        end = min(done + limit, len(whole))
        tokens, targets = whole[max(end - limit - 1, 0) : end - 1], whole[done:end]
        found.append(Prediction(tokens, range(len(tokens) - len(targets), len(tokens)), targets))
        done = end
    return found


def masked_in_turn(ids: Sequence[int], special: Sequence[int], mask: int) -> list[Prediction]:
    """Returns a row for each token of a text that is not special (`special` is 0 there), in which it is masked.

    The sum of their log-probabilities is the pseudo-log-likelihood of the text (Salazar et al. 2020, arXiv 1910.14659,
    section 2).
    """
    places = [place for place, is_special in enumerate(special) if not is_special]
    return [Prediction([*ids[:place], mask, *ids[place + 1 :]], [place], [ids[place]]) for place in places]

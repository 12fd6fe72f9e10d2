"""Rows for a masked language model: special tokens, segments, and which tokens to predict.

Devlin et al. 2019 (arXiv 1810.04805, section 3.1): of the chosen tokens 80 % are replaced by the mask token,
10 % by a random one, 10 % are left. Sentence order: Lan et al. 2020 (arXiv 1909.11942, section 3.1).
"""

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from odelm import rng
from odelm.config import Config
from odelm.data.tokenizer import special_id, special_ids
from odelm.errors import InputError

MASKED, RANDOM = 0.8, 0.1


@dataclass(frozen=True, eq=False)
class MaskedRows:
    """Turns a window of tokens into a row of `length` (L) tokens with P of them to predict.

    The draws of row `index` are a function of (seed, stream, index).
    """

    length: int
    count: int
    """P, the number of positions to predict: the same in every row, so that shapes are."""
    cls: int
    sep: int
    pad: int
    mask: int
    ordinary: np.ndarray
    """The ids, int32 (n,), of the tokens that stand for text."""
    maskable: np.ndarray
    """bool (V,), True at the ordinary ids."""
    sentence_order: bool
    token_types: bool
    seed: int
    stream: str

    @property
    def size(self) -> int:
        """Tokens of text in a full row: what is left beside [CLS] and one [SEP] a segment."""
        return self.length - (3 if self.sentence_order else 2)

    @property
    def stride(self) -> int:
        return self.size

    def row(self, index: int, window: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the row of `window`, int32 (size,) or shorter.

        `tokens` int32 (L,), `mask` bool (L,) True at real tokens, `positions` int32 (P,) sorted, `targets`
        int32 (P,), `weights` float32 (P,) 0 where there was nothing left to predict; with token types
        `token_types` int32 (L,); with sentence order `order` int32 (), 1 where the segments were swapped.
        """
        draw = rng.host(self.seed, self.stream, index)
        segments, swapped = self._segments(window, draw)
        types = np.repeat(np.arange(len(segments)), [len(segment) for segment in segments])
        real = np.concatenate(segments)
        original = np.full(self.length, self.pad, np.int32)
        original[: len(real)] = real
        row = {"mask": np.arange(self.length) < len(real), **self._masked(original, draw)}
        if self.token_types:
            row["token_types"] = np.pad(types, (0, self.length - len(real))).astype(np.int32)
        if self.sentence_order:
            row["order"] = np.int32(swapped)
        return row

    def _segments(self, window: np.ndarray, draw: np.random.Generator) -> tuple[list[np.ndarray], bool]:
        """Returns the segments with their special tokens, [CLS] A [SEP] and B [SEP], and whether they were swapped.

        Of an odd number of tokens either half may have the one more, or the lengths would give the order away.
        """
        if not self.sentence_order:
            return [np.concatenate([[self.cls], window, [self.sep]])], False
        cut = (len(window) + draw.integers(2)) // 2
        swapped = bool(draw.integers(2))
        first, second = (window[cut:], window[:cut]) if swapped else (window[:cut], window[cut:])
        return [np.concatenate([[self.cls], first, [self.sep]]), np.append(second, self.sep)], swapped

    def _masked(self, original: np.ndarray, draw: np.random.Generator) -> dict[str, np.ndarray]:
        candidates = np.flatnonzero(self.maskable[original])
        chosen = np.sort(draw.choice(candidates, min(self.count, len(candidates)), replace=False))
        fate = draw.random(len(chosen))
        random = draw.choice(self.ordinary, len(chosen))
        replaced = np.where(fate < MASKED, self.mask, np.where(fate < MASKED + RANDOM, random, original[chosen]))
        tokens = original.copy()
        tokens[chosen] = replaced
        # Positions that count for nothing are the last one, so that the list stays sorted.
        positions = np.full(self.count, self.length - 1, np.int32)
        positions[: len(chosen)] = chosen
        weights = (np.arange(self.count) < len(chosen)).astype(np.float32)
        return {"tokens": tokens, "positions": positions, "targets": original[positions], "weights": weights}


def masked_rows(tokenizer: Tokenizer, config: Config, *, length: int, stream: str) -> MaskedRows:
    """Returns the rows of `length` tokens that `config` asks for.

    Raises InputError if the tokenizer lacks a special token, or `length` has no room for text beside them.
    """
    shortest = 5 if config.model.sentence_order else 3
    if length < shortest:
        raise InputError(f"a row of {length} tokens has no room for text, expected {shortest} or more: train.length")
    ids = {role: special_id(tokenizer, role) for role in ("cls", "sep", "pad", "mask")}
    vocabulary = np.array(sorted(tokenizer.get_vocab().values()), np.int32)
    ordinary = np.setdiff1d(vocabulary, special_ids(tokenizer)).astype(np.int32)
    return MaskedRows(
        length=length,
        count=max(1, round(config.data.mask_rate * length)),
        ordinary=ordinary,
        maskable=np.isin(np.arange(vocabulary[-1] + 1), ordinary),
        sentence_order=config.model.sentence_order,
        token_types=config.model.token_types > 1,
        seed=config.train.seed,
        stream=stream,
        **ids,
    )

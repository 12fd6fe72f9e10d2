"""Rows for a masked language model: special tokens, segments, and which tokens to predict.

Devlin et al. 2019 (arXiv 1810.04805, section 3.1): of the chosen tokens 80 % are replaced by the mask token,
10 % by a random one, 10 % are left. Sentence order: Lan et al. 2020 (arXiv 1909.11942, section 3.1).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from odelm import rng
from odelm.config import Config
from odelm.data.tokenizer import special_id, special_ids
from odelm.errors import InputError

MASKED, RANDOM = 0.8, 0.1


@dataclass(frozen=True, eq=False)
class MaskedRows:
    """Turns windows of tokens into rows of `length` (L) tokens with P of them to predict, a batch at a time.

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
        """Returns the row of one window, int32 (size,) or shorter: see `batch`, without the leading axis."""
        padded = np.pad(window, (0, self.size - len(window)))
        made = self.batch({"index": np.array([index]), "window": padded[None], "count": np.array([len(window)])})
        return {name: array[0] for name, array in made.items()}

    def batch(self, windows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the rows of windows: `index` int (B,), `window` int32 (B, size), of which `count` (B,) tokens count.

        `tokens` int32 (B, L), `mask` bool (B, L) True at real tokens, `positions` int32 (B, P) sorted, `targets`
        int32 (B, P), `weights` float32 (B, P) 0 where there was nothing left to predict; with token types
        `token_types` int32 (B, L); with sentence order `order` int32 (B,), 1 where the segments were swapped.
        """
        draws = rng.bits(self.seed, self.stream, windows["index"], 3 * self.length + 2)
        layout = self._layout(windows["count"], draws[:, -2:] >> np.uint64(63) == 1)
        original = np.take_along_axis(windows["window"], np.clip(layout.source, 0, self.size - 1), axis=1)
        for places, token in ((layout.cls, self.cls), (layout.sep, self.sep), (~layout.real, self.pad)):
            original = np.where(places, token, original)
        rows = {"mask": layout.real, **self._masked(original.astype(np.int32), draws[:, :-2])}
        if self.token_types:
            rows["token_types"] = layout.second.astype(np.int32)
        if self.sentence_order:
            rows["order"] = layout.swapped.astype(np.int32)
        return rows

    def _layout(self, count: np.ndarray, coins: np.ndarray) -> "_Layout":
        """Returns where everything stands: [CLS] A [SEP] and, with sentence order, B [SEP]. `coins` is bool (B, 2).

        Of an odd number of tokens either half may have the one more, or the lengths would give the order away.
        """
        place, count = np.arange(self.length), np.asarray(count)[:, None]
        cls = np.broadcast_to(place == 0, (len(count), self.length))
        if not self.sentence_order:
            source = np.broadcast_to(place - 1, cls.shape)
            return _Layout(source, cls, place == count + 1, place < count + 2, np.zeros_like(cls), coins[:, 1])
        cut = (count + coins[:, :1]) // 2
        swapped = coins[:, 1:]
        first = np.where(swapped, count - cut, cut)
        in_first, start = place <= first, np.where(swapped, cut, 0)
        # Of the second segment, the place after its first token is two past the first segment's [SEP].
        source = np.where(in_first, start + place - 1, np.where(swapped, 0, cut) + place - first - 2)
        sep = (place == first + 1) | (place == count + 2)
        real = place < count + 3
        return _Layout(source, cls, sep, real, (place > first + 1) & real, coins[:, 1])

    def _masked(self, original: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Chooses among the maskable tokens of `original` (B, L), by draws (B, 3 L), and replaces the chosen."""
        order, fate, token = np.split(draws, 3, axis=1)
        maskable = self.maskable[original]
        # The smallest draws win; what may not be chosen has the largest.
        ranks = np.where(maskable, order >> np.uint64(1), np.uint64(2**64 - 1))
        chosen = np.argpartition(ranks, self.count - 1, axis=1)[:, : self.count]
        chosen = np.sort(np.where(np.take_along_axis(maskable, chosen, 1), chosen, self.length), axis=1)
        counted = chosen < self.length
        # Positions that count for nothing are the last one, so that the list stays sorted.
        positions = np.minimum(chosen, self.length - 1)
        share = (fate >> np.uint64(11)) * 2.0**-53
        random = self.ordinary[token % np.uint64(len(self.ordinary))]
        replaced = np.where(share < MASKED, self.mask, np.where(share < MASKED + RANDOM, random, original))
        hidden = np.zeros((len(original), self.length + 1), bool)
        np.put_along_axis(hidden, chosen, True, axis=1)
        return {
            "tokens": np.where(hidden[:, :-1], replaced, original).astype(np.int32),
            "positions": positions.astype(np.int32),
            "targets": np.take_along_axis(original, positions, 1),
            "weights": counted.astype(np.float32),
        }


class _Layout(NamedTuple):
    """Of each place of a row (B, L): the token of the window that stands there, and what else it is."""

    source: np.ndarray
    cls: np.ndarray
    sep: np.ndarray
    real: np.ndarray
    second: np.ndarray
    swapped: np.ndarray
    """bool (B,)."""


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

"""Rows for a masked language model: special tokens, segments, and which tokens to predict.

Devlin et al. 2019 (arXiv 1810.04805, section 3.1): of the chosen tokens 80 % are replaced by the mask token, 10 % by a
random one, 10 % are left unchanged; this is drawn for each token separately, also within a word or span. Sentence
order: Lan et al. 2020 (arXiv 1909.11942, section 3.1).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from odelm import rng
from odelm.config import Config
from odelm.data.spans import MaskUnit, make_unit
from odelm.errors import InputError
from odelm.tokenizer import NAMES, end_id, find_id, special_id, special_ids

MASKED, RANDOM = 0.8, 0.1


@dataclass(frozen=True, eq=False)
class MaskedRows:
    """Turns windows of tokens into rows of `length` (L) tokens with P of them to predict, a batch at a time.

    The draws of row `index` are a function of (seed, stream, index).
    """

    length: int
    rate: float
    """The largest share of a row's tokens, special ones counted, that is predicted."""
    unit: MaskUnit
    """What is chosen as a whole: a token, a word or a span of words."""
    cls: int
    sep: int
    pad: int
    mask: int
    end: int | None
    """The end-of-text token; None where the tokenizer has none. It may be the same as `sep`."""
    ordinary: np.ndarray
    """The ids, int32 (n,), of the tokens that represent text."""
    maskable: np.ndarray
    """bool (V,), True at the ordinary ids."""
    sentence_order: bool
    token_types: bool
    seed: int
    stream: str
    segments: bool = False
    """Whether rows have `segments`, so that attention can be kept within documents. Rows with sentence order hold one
    document and have no segments: the config refuses both together."""

    def __post_init__(self):
        if self.segments and self.end is None:
            names = ", ".join(NAMES["end"])
            raise InputError(f"documents are separated by an end token, but the tokenizer has none of {names}")

    @property
    def count(self) -> int:
        """P, the number of positions to predict: the same in every row, so that shapes are fixed."""
        return max(1, round(self.rate * self.length))

    @property
    def size(self) -> int:
        """Tokens of text in a full row: those left beside [CLS] and one [SEP] per segment."""
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
        """Returns the rows of `windows`: `index` int (B,), `window` int32 (B, size), of which `count` (B,) tokens are
        valid.

        `tokens` int32 (B, L), `mask` bool (B, L) True at real tokens, `positions` int32 (B, P) sorted, `targets`
        int32 (B, P), `weights` float32 (B, P) 0 where there was nothing left to predict; with token types
        `token_types` int32 (B, L); with segments `segments` int32 (B, L), the number of the document in its row, from
        0; with sentence order `order` int32 (B,), 1 where the segments were swapped, and `order_weights` float32 (B,),
        0 where a row has fewer than two tokens of text, which have no order.

        Sentence order assumes that each window is part of one document, without its end token.
        """
        draws = rng.bits(self.seed, self.stream, windows["index"], 3 * self.length + 2)
        order, fate, token = np.split(draws[:, :-2], 3, axis=1)
        layout = self._layout(windows["count"], draws[:, -2:] >> np.uint64(63) == 1)
        original = self._original(windows["window"], layout)
        chosen = self.unit.choose(original, self.maskable[original], order, self._budget(layout))
        rows = {"mask": layout.real, "tokens": self._replaced(original, chosen, fate, token)}
        rows |= self._predicted(original, chosen)
        if self.token_types:
            rows["token_types"] = layout.second.astype(np.int32)
        if self.segments:
            rows["segments"] = self._segments(original, np.asarray(windows["count"]))
        if self.sentence_order:
            rows["order"] = layout.swapped.astype(np.int32)
            rows["order_weights"] = (np.asarray(windows["count"]) >= 2).astype(np.float32)
        return rows

    def _layout(self, count: np.ndarray, coins: np.ndarray) -> "_Layout":
        """Returns the layout of each row: [CLS] A [SEP] and, with sentence order, B [SEP]. `coins` is bool (B, 2).

        When the number of tokens is odd, a coin gives the extra one to either half; otherwise the lengths would reveal
        the order.
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

    def _original(self, windows: np.ndarray, layout: "_Layout") -> np.ndarray:
        """Returns the rows int32 (B, L) before anything is masked."""
        original = np.take_along_axis(windows, np.clip(layout.source, 0, self.size - 1), axis=1)
        for places, token in ((layout.cls, self.cls), (layout.sep, self.sep), (~layout.real, self.pad)):
            original = np.where(places, token, original)
        return original.astype(np.int32)

    def _budget(self, layout: "_Layout") -> np.ndarray:
        """Returns the most tokens to predict, int (B,): `rate` of the real ones, at least one; P for a full row."""
        return np.maximum(1, np.rint(self.rate * layout.real.sum(axis=1)).astype(int))

    def _replaced(self, original: np.ndarray, chosen: np.ndarray, fate: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Returns `original` int32 (B, L) with the chosen tokens replaced: the draws `fate` (B, L) decide how, and the
        draws `token` (B, L) by which token."""
        share = (fate >> np.uint64(11)) * 2.0**-53
        random = self.ordinary[token % np.uint64(len(self.ordinary))]
        replaced = np.where(share < MASKED, self.mask, np.where(share < MASKED + RANDOM, random, original))
        return np.where(chosen, replaced, original).astype(np.int32)

    def _predicted(self, original: np.ndarray, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """Lists the chosen places; entries of weight 0 name the last place of the row, so that the list stays
        sorted."""
        row, place = np.nonzero(chosen)
        slot = np.cumsum(chosen, axis=1)[chosen] - 1
        positions = np.full((len(original), self.count), self.length - 1, np.int32)
        weights = np.zeros(positions.shape, np.float32)
        positions[row, slot], weights[row, slot] = place, 1
        return {"positions": positions, "targets": np.take_along_axis(original, positions, 1), "weights": weights}

    def _segments(self, original: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Returns for each place the number, within its row, of the document that it belongs to, int32 (B, L).

        An end token belongs to the document that it ends, and [CLS] to the first document. The [SEP] after the text,
        and the padding, belong to the document of the last token of text, even if that is an end token.
        """
        place = np.arange(self.length)
        ends = (original == self.end) & (place > 0) & (place < count[:, None])
        return (np.cumsum(ends, axis=1) - ends).astype(np.int32)


class _Layout(NamedTuple):
    """What each place (B, L) of the rows is; `source` is the index of its token in the window."""

    source: np.ndarray
    cls: np.ndarray
    sep: np.ndarray
    real: np.ndarray
    second: np.ndarray
    swapped: np.ndarray
    """bool (B,)."""


def masked_rows(tokenizer: Tokenizer, config: Config, *, length: int, stream: str) -> MaskedRows:
    """Returns the rows of `length` tokens that `config` asks for.

    Raises InputError if the tokenizer lacks a special token, or has no known words where the unit needs them, or
    `length` has no room for text beside the special tokens.
    """
    shortest = 5 if config.model.sentence_order else 3
    if length < shortest:
        raise InputError(f"a row of {length} tokens has no room for text, expected {shortest} or more: train.length")
    vocabulary = np.array(sorted(tokenizer.get_vocab().values()), np.int32)
    ordinary = np.setdiff1d(vocabulary, special_ids(tokenizer)).astype(np.int32)
    return MaskedRows(
        length=length,
        rate=config.data.mask_rate,
        unit=make_unit(config.data.mask_unit, tokenizer),
        cls=special_id(tokenizer, "cls"),
        sep=special_id(tokenizer, "sep"),
        pad=special_id(tokenizer, "pad"),
        mask=special_id(tokenizer, "mask"),
        end=end_id(tokenizer, config.data.end_token) if config.data.end_token else find_id(tokenizer, "end"),
        ordinary=ordinary,
        maskable=np.isin(np.arange(vocabulary[-1] + 1), ordinary),
        sentence_order=config.model.sentence_order,
        token_types=config.model.token_types > 1,
        segments=config.packing == "segments",
        seed=config.train.seed,
        stream=stream,
    )

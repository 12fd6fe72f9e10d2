"""How much of the held-out text is also in the training text, by hashes of windows of tokens.

Copies of a whole document are left out when a corpus is read, so the two splits never share one; a passage, such as a
licence or a quotation, may be in several documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from odelm.data.tokens import Split

WINDOW = 32
"""Tokens, a power of two."""
BASE = 0x9E37_79B9_7F4A_7C15
"""The base of the polynomial, odd; sums and products are modulo 2**64."""
CHUNK = 1 << 22
DROPPED_BITS = np.uint64(40)
"""The table of known hashes, which rules out most windows, is indexed by a hash without its lowest bits."""


@dataclass(frozen=True)
class Overlap:
    """How many windows the held-out documents are cut into, and how many of them are anywhere in the training text."""

    windows: int
    in_training: int
    window: int = WINDOW

    def __str__(self) -> str:
        share = self.in_training / max(self.windows, 1)
        return (
            f"{self.in_training:,} of {self.windows:,} held-out windows of {self.window} tokens ({share:.2%}) stand in "
            "the training text too"
        )


def overlap(train: Split, held_out: Split) -> Overlap:
    """Returns how much of the held-out split is also in the training split; reads both once."""
    wanted = np.concatenate([np.empty(0, np.uint64), *_cut(held_out)])
    known, table = np.unique(wanted), np.zeros(1 << (64 - int(DROPPED_BITS)), bool)
    table[known >> DROPPED_BITS] = True
    found = np.zeros(len(known), bool)
    for stream in train.values():
        for start in range(0, max(len(stream.tokens) - WINDOW + 1, 0), CHUNK):
            hashes = hashes_of(stream.tokens[start : min(start + CHUNK + WINDOW - 1, len(stream.tokens))])
            likely = hashes[table[hashes >> DROPPED_BITS]]
            # One lookup per likely hash, because a large corpus has millions of known ones and thousands of chunks.
            places = np.minimum(np.searchsorted(known, likely), len(known) - 1)
            found[places[known[places] == likely]] = True
    return Overlap(len(wanted), int(np.isin(wanted, known[found]).sum()))


def hashes_of(tokens: np.ndarray) -> np.ndarray:
    """Returns a hash of the window that begins at each place, uint64 (n - WINDOW + 1,), of tokens (n,)."""
    hashes, size, power = tokens.astype(np.uint64) + np.uint64(1), 1, BASE
    while size < WINDOW:
        hashes = hashes[: len(hashes) - size] * np.uint64(power) + hashes[size:]
        size, power = 2 * size, power * power % 2**64
    # The lowest bits of a polynomial depend on few tokens; the table looks at the highest.
    return hashes ^ (hashes >> np.uint64(32))


def _cut(split: Split) -> Iterator[np.ndarray]:
    """Yields the hashes of each document's windows, which are side by side from the document's beginning."""
    for stream in split.values():
        tokens = stream.tokens[0 : len(stream.tokens)]
        if len(tokens) < WINDOW:
            continue
        hashes, ends = hashes_of(tokens), np.cumsum(stream.lengths)
        for end, length in zip(ends, stream.lengths, strict=True):
            # The last token of a document is the end token.
            yield hashes[end - length : end - WINDOW : WINDOW] if length > WINDOW else hashes[:0]

"""What a row of training is made of: windows of tokens with random access, so that any order can be read."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from odelm.data.tokens import Split, Stream, Tokens


class Windows(Protocol):
    """A sequence of arrays int32 (n,), n at most the size of a window."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


class StreamWindows:
    """Windows of `size` tokens, `stride` apart, that cover all of a stream (n,), documents or not.

    The last window is cut short, or with `whole` begins early enough to be of full size.
    """

    def __init__(self, stream: Stream, *, size: int, stride: int, whole: bool = False):
        self._tokens, self._size, self._stride = stream.tokens, size, stride
        self._last_start = len(stream.tokens) - size if whole else len(stream.tokens)

    def __len__(self) -> int:
        return max(0, -(-(len(self._tokens) - (self._size - self._stride)) // self._stride))

    def __getitem__(self, index: int) -> np.ndarray:
        start = min(_checked(index, self) * self._stride, self._last_start)
        return self._tokens[start : start + self._size].astype(np.int32)


class DocumentWindows:
    """Windows of `size` tokens, `stride` apart, that cover each document of a stream on its own.

    Each document's last window is cut short. `before` and `after` say how many tokens the windows reach beyond the
    document's first and its last, the end token: with a `before` of 1 they begin with the end token of the document
    before, from which a decoder predicts the first; with an `after` of -1 they leave the document's own end token out.
    """

    def __init__(self, stream: Stream, *, size: int, stride: int, before: int = 0, after: int = 0):
        self._tokens, self._size, self._stride = stream.tokens, size, stride
        ends = np.cumsum(stream.lengths)
        self._starts = np.maximum(ends - stream.lengths - before, 0)
        self._ends = ends + after
        tokens = self._ends - self._starts - (size - stride)
        self._counted = np.cumsum(np.maximum(-(-tokens // stride), 0))

    def __len__(self) -> int:
        return int(self._counted[-1]) if len(self._counted) else 0

    def __getitem__(self, index: int) -> np.ndarray:
        document = int(np.searchsorted(self._counted, _checked(index, self), side="right"))
        number = index - (int(self._counted[document - 1]) if document else 0)
        start = int(self._starts[document]) + number * self._stride
        return self._tokens[start : min(start + self._size, int(self._ends[document]))].astype(np.int32)


class JoinedTokens:
    """The tokens (n,) of several components, one after the other, with slices as an array has."""

    def __init__(self, parts: Sequence[Tokens]):
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, _ = place.indices(len(self))
        found, part = [self._parts[0][:0]], int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin, until = int(self._ends[part]) - len(self._parts[part]), min(stop, int(self._ends[part]))
            found.append(self._parts[part][start - begin : until - begin])
            start, part = until, part + 1
        return np.concatenate(found)


def joined(split: Split) -> Stream:
    """Returns all components of a split as one stream: windows of it may reach from one into the next."""
    streams = list(split.values())
    if len(streams) == 1:
        return streams[0]
    tokens = JoinedTokens([stream.tokens for stream in streams])
    return Stream(tokens, np.concatenate([stream.lengths for stream in streams]))


def _checked(index: int, windows: Windows) -> int:
    if not 0 <= index < len(windows):
        raise IndexError(f"window {index} of {len(windows)}")
    return index

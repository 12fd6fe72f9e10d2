"""Windows of tokens, from which rows are made, with random access, so that they can be read in any order."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from odelm.data.tokens import Split, Stream, TokenArray


class Windows(Protocol):
    """The windows of a stream, of at most `size` tokens each."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the windows of `indices` (B,): `window` int32 (B, size), of which `count` int64 (B,) tokens are
        valid."""
        ...


class Spans(ABC):
    """Base class of windows given by where they start and stop."""

    def __init__(self, tokens: TokenArray, size: int):
        self._tokens, self._size = tokens, size

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def spans(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the windows of `indices` (B,) start and stop in the stream."""

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        starts, stops = self.spans(indices)
        window = np.zeros((len(indices), self._size), np.int32)
        for row, start, stop in zip(window, starts.tolist(), stops.tolist(), strict=True):
            row[: stop - start] = self._tokens[start:stop]
        return {"window": window, "count": stops - starts}


class StreamWindows(Spans):
    """Windows of `size` tokens, `stride` apart, that cover all of a stream (n,), documents or not.

    The last window is cut short, or with `whole` begins early enough to be of full size.
    """

    def __init__(self, stream: Stream, *, size: int, stride: int, whole: bool = False):
        super().__init__(stream.tokens, size)
        self._stride, self._total = stride, len(stream.tokens)
        self._last_start = self._total - size if whole else self._total

    def __len__(self) -> int:
        return max(0, -(-(self._total - (self._size - self._stride)) // self._stride))

    def spans(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = np.minimum(indices * self._stride, self._last_start)
        return starts, np.minimum(starts + self._size, self._total)


class DocumentWindows(Spans):
    """Windows of `size` tokens, `stride` apart, that cover each document of a stream on its own.

    Each document's last window is cut short. `before` and `after` say how many tokens the windows reach beyond the
    document's first token and its last, the end token: with a `before` of 1 they begin with the end token of the
    previous document, from which a decoder predicts the first token; with an `after` of -1 they leave the document's
    own end token out.
    """

    def __init__(self, stream: Stream, *, size: int, stride: int, before: int = 0, after: int = 0):
        super().__init__(stream.tokens, size)
        self._stride = stride
        ends = np.cumsum(stream.lengths)
        self._starts = np.maximum(ends - stream.lengths - before, 0)
        self._ends = ends + after
        tokens = self._ends - self._starts - (size - stride)
        self._counted = np.cumsum(np.maximum(-(-tokens // stride), 0))

    def __len__(self) -> int:
        return int(self._counted[-1]) if len(self._counted) else 0

    def spans(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        documents = np.searchsorted(self._counted, indices, side="right")
        numbers = indices - np.where(documents > 0, self._counted[documents - 1], 0)
        starts = self._starts[documents] + numbers * self._stride
        return starts, np.minimum(starts + self._size, self._ends[documents])


class JoinedWindows:
    """The windows of several streams, one stream after the other; each window is from one stream."""

    def __init__(self, parts: Sequence[Windows]):
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        owner, found = np.searchsorted(self._ends, indices, side="right"), {}
        for part in np.unique(owner):
            own = owner == part
            rows = self._parts[part].batch(indices[own] - (self._ends[part] - len(self._parts[part])))
            for name, array in rows.items():
                found.setdefault(name, np.empty((len(indices), *array.shape[1:]), array.dtype))[own] = array
        return found


class JoinedTokens:
    """The tokens (n,) of several components, one after the other, with slices as an array has."""

    def __init__(self, parts: Sequence[TokenArray]):
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
    """Returns all components of a split as one stream: its windows may reach from one component into the next."""
    streams = list(split.values())
    if len(streams) == 1:
        return streams[0]
    tokens = JoinedTokens([stream.tokens for stream in streams])
    return Stream(tokens, np.concatenate([stream.lengths for stream in streams]))

"""Prepared tokens, read at any place.

A token shard is a file of consecutive documents from one split. It holds, component after component, the documents'
tokens in a row, each document followed by the end token, cut into records of `RECORD_TOKENS` tokens (the last record
of a component is shorter). So the records that hold tokens a to b of a component are known by arithmetic.
"""

import hashlib
import json
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tokenizers import Tokenizer

from odelm import tokenizer as tokenizers
from odelm.config import SPLITS
from odelm.errors import InputError

RECORD_TOKENS = 8192
"""Tokens in a record: reading this many takes about as long as finding the record."""
OTHER_FILES = 512
"""Open files that a program needs besides its token files."""
INDEX, TOKENIZER = "prepared.json", "tokenizer.json"


class TokenArray(Protocol):
    """Tokens (n,) that are read in slices without a step: an array, or a reader of files."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Stream:
    """A component of a split: its tokens (n,), each document followed by the end token, and the lengths of its
    documents, int64 (documents,), which count the end tokens."""

    tokens: TokenArray
    lengths: np.ndarray


Split = Mapping[str, Stream]
"""The components of a split by name, in the order of their names."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A corpus as tokens, component by component, in a fixed order."""

    tokenizer: Tokenizer
    train: Split
    validation: Split
    bytes_per_token: float
    """UTF-8 bytes of the validation documents divided by their tokens, end-of-text tokens counted."""
    directory: Path
    digest: str
    """SHA-256, in hex, of the tokens of both splits."""

    @property
    def train_tokens(self) -> int:
        return sum(len(stream.tokens) for stream in self.train.values())


def open_prepared(directory: Path, tokenizer: Tokenizer) -> Prepared:
    """Returns the tokens in `directory`, which `odelm.data.prepare` wrote with `tokenizer`.

    Raises InputError if they are incomplete or corrupt, or were made with another tokenizer.
    """
    try:
        return _opened(directory, tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{directory} is incomplete or corrupt ({error!r}); remove it, and the same command makes it again"
        ) from error


def index(directory: Path) -> dict:
    """Returns the contents of `prepared.json` in a directory of tokens."""
    return json.loads((directory / INDEX).read_text())


def sha256(text: str) -> str:
    """Returns the SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def _opened(directory: Path, tokenizer: Tokenizer) -> Prepared:
    meta = index(directory)
    _check_tokenizer(directory, meta["tokenizer_sha256"], tokenizer)
    splits = {
        split: _open_split(directory / split, meta["splits"][split]["units"], np.dtype(meta["dtype"]))
        for split in SPLITS
    }
    held_out = meta["splits"]["validation"]
    digest = sha256("".join(shard["sha256"] for split in SPLITS for shard in meta["splits"][split]["units"]))
    bytes_per_token = held_out["bytes"] / held_out["tokens"]
    return Prepared(tokenizer, splits["train"], splits["validation"], bytes_per_token, directory, digest)


def _check_tokenizer(directory: Path, expected: str, tokenizer: Tokenizer) -> None:
    beside = tokenizers.load(directory / TOKENIZER).to_str()
    for what, text in ((f"{directory / TOKENIZER}", beside), ("the tokenizer", tokenizer.to_str())):
        if sha256(text) != expected:
            raise InputError(
                f"{what} has SHA-256 {sha256(text)[:12]}, but the tokens in {directory} were made with "
                f"{expected[:12]}; restore it, or remove {directory} to prepare it again"
            )


class TokenStream:
    """The tokens (n,) of one component of a split, read from its shards on demand: `stream[a:b]`."""

    def __init__(self, source: Sequence[bytes], pieces: Sequence[tuple[int, int]], dtype: np.dtype):
        """`pieces` are the (first record in `source`, tokens) of each shard."""
        self._source, self._dtype = source, dtype
        self._first = np.array([first for first, _ in pieces], np.int64)
        self._ends = np.cumsum([tokens for _, tokens in pieces], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, place: slice) -> np.ndarray:
        """Returns the tokens of a slice without a step."""
        start, stop, _ = place.indices(len(self))
        parts = [np.empty(0, self._dtype)]
        piece = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[piece - 1]) if piece else 0
            until = min(stop, int(self._ends[piece]))
            parts.append(self._read(int(self._first[piece]), start - begin, until - begin))
            start, piece = until, piece + 1
        return np.concatenate(parts)

    def _read(self, first: int, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop` of the piece whose first record is `first`."""
        records = range(start // RECORD_TOKENS, (stop - 1) // RECORD_TOKENS + 1)
        tokens = [np.frombuffer(self._source[first + record], self._dtype) for record in records]
        offset = records[0] * RECORD_TOKENS
        return np.concatenate(tokens)[start - offset : stop - offset]


def _open_split(directory: Path, reports: Sequence[dict], dtype: np.dtype) -> Split:
    """Returns the split whose shards are in `directory`.

    Raises InputError for a file that is missing, or of another size than when it was written.
    """
    files = [directory / report["file"] for report in reports]
    for file, report in zip(files, reports, strict=True):
        documents = sum(counts["documents"] for counts in report["components"].values())
        _check_size(file, report["size"])
        _check_size(file.with_suffix(".lengths"), 4 * documents)
    _allow_open_files(len(files))
    source = cast(Sequence[bytes], ArrayRecordDataSource([str(file) for file in files]))
    pieces: dict[str, list[tuple[int, int]]] = {}
    lengths: dict[str, list[np.ndarray]] = {}
    first = 0
    for file, report in zip(files, reports, strict=True):
        of_shard, place = np.fromfile(file.with_suffix(".lengths"), "<u4"), 0
        for name, counts in report["components"].items():
            pieces.setdefault(name, []).append((first, counts["tokens"]))
            lengths.setdefault(name, []).append(of_shard[place : place + counts["documents"]])
            first += -(-counts["tokens"] // RECORD_TOKENS)
            place += counts["documents"]
    return {
        name: Stream(TokenStream(source, pieces[name], dtype), np.concatenate(lengths[name]).astype(np.int64))
        for name in sorted(pieces)
    }


def _allow_open_files(count: int) -> None:
    """Lets this process keep `count` files open at once, which reading them in any order requires."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(f"{count} files of tokens must be open at once, but the limit is {hard}: raise `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _check_size(file: Path, expected: int) -> None:
    size = file.stat().st_size if file.exists() else None
    if size != expected:
        raise InputError(
            f"{file} is {'missing' if size is None else f'{size} bytes'}, expected {expected} bytes; remove "
            f"{file.parents[1]}, and the same command makes it again"
        )

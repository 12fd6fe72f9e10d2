"""Token shards: documents as integers in ArrayRecord, written unit by unit and read at any place.

A unit is a run of documents of a split. Its file holds, component after component, the documents' tokens in a row,
each document followed by the end token, cut into records of `CHUNK` tokens (the last of a component is shorter). So
tokens a to b of a component lie in records that are known by arithmetic.
"""

import hashlib
import itertools
import json
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tokenizers import Tokenizer

from odelm.data import tokenizer as tokenizers
from odelm.data.corpus import Corpus
from odelm.data.records import record_writer
from odelm.errors import InputError
from odelm.files import writing

CHUNK = 8192
"""Tokens a record: reading one takes about as long as finding it."""
OTHER_FILES = 512
"""Open files that a program needs beside those of its tokens."""
UNIT_BYTES, MOST_UNITS = 32 << 20, 1024


@dataclass(frozen=True)
class Unit:
    """Documents `start` to `stop` of a split of a corpus, to be written to `path`."""

    corpus: Corpus
    split: str
    start: int
    stop: int
    tokenizer: str
    """As JSON: what a process that writes a unit is given."""
    path: Path

    @property
    def report(self) -> Path:
        """Written last: a unit with its report is whole."""
        return self.path.with_suffix(".json")


def units(corpus: Corpus, split: str, tokenizer: Tokenizer, directory: Path) -> list[Unit]:
    """Returns the units of a split: what there is to do depends on the corpus alone."""
    documents, size = corpus.size(split)
    count = max(1, min(-(-size // UNIT_BYTES), MOST_UNITS, documents))
    cuts = [documents * number // count for number in range(count + 1)]
    text, corpus = tokenizer.to_str(), corpus.reader()
    return [
        Unit(corpus, split, start, stop, text, directory / split / f"{number:05d}.array_record")
        for number, (start, stop) in enumerate(zip(cuts[:-1], cuts[1:], strict=True))
    ]


def write_unit(unit: Unit) -> None:
    """Writes the tokens of a unit, the lengths of its documents, and a report of both."""
    tokenizer = Tokenizer.from_str(unit.tokenizer)
    texts: dict[str, list[str]] = {}
    for document in unit.corpus.documents(unit.split, unit.start, unit.stop):
        texts.setdefault(document.component, []).append(document.text)
    texts = {name: texts[name] for name in sorted(texts)}
    tokens, ends = _encoded(tokenizer, texts)
    stops = [0, *(int(ends[count - 1]) for count in np.cumsum([len(own) for own in texts.values()]))]
    pieces = dict(zip(texts, itertools.pairwise(stops), strict=True))
    with writing(unit.path) as partial, record_writer(partial, compress=False) as writer:
        for start, stop in pieces.values():
            for first in range(start, stop, CHUNK):
                writer.write(tokens[first : min(first + CHUNK, stop)].tobytes())
    with writing(unit.path.with_suffix(".lengths")) as partial:
        np.diff(ends, prepend=0).astype("<u4").tofile(partial)
    report = {
        "file": unit.path.name,
        "size": unit.path.stat().st_size,
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "components": {name: _counts(texts[name], *pieces[name]) for name in texts},
    }
    with writing(unit.report) as partial:
        partial.write_text(json.dumps(report) + "\n")


def _encoded(tokenizer: Tokenizer, texts: Mapping[str, list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of all texts, one component after the other, and where each text's tokens end."""
    dtype, end = dtype_of(tokenizer), tokenizers.special_id(tokenizer, "end")
    runs = tokenizers.encode(tokenizer, itertools.chain.from_iterable(texts.values()))
    tokens = np.concatenate([np.empty(0, dtype), *runs]).astype(dtype)
    ends = np.flatnonzero(tokens == end) + 1
    if len(ends) != sum(len(own) for own in texts.values()):
        raise InputError(
            f"the tokenizer's end token {tokenizer.id_to_token(end)!r} also stands for text, so that documents cannot "
            "be told apart; use a tokenizer that has it as a special token"
        )
    return tokens, ends


def _counts(texts: Sequence[str], start: int, stop: int) -> dict[str, int]:
    return {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts), "tokens": stop - start}


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Returns the smallest unsigned type that holds the tokenizer's ids."""
    return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)


class TokenStream:
    """The tokens (n,) of one component of a split, read where they are asked for: `stream[a:b]`."""

    def __init__(self, source: Sequence[bytes], pieces: Sequence[tuple[int, int]], dtype: np.dtype):
        """`pieces` are the (first record in `source`, tokens) of each unit."""
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
        """Returns tokens `start` to `stop` of the piece that begins with record `first`."""
        records = range(start // CHUNK, (stop - 1) // CHUNK + 1)
        tokens = [np.frombuffer(self._source[first + record], self._dtype) for record in records]
        offset = records[0] * CHUNK
        return np.concatenate(tokens)[start - offset : stop - offset]


class Tokens(Protocol):
    """Tokens (n,) to be read in slices without a step: an array, or what reads one from files."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Stream:
    """A component of a split: its tokens (n,), each document followed by the end token, and its documents' lengths,
    int64 (documents,), the end tokens counted."""

    tokens: Tokens
    lengths: np.ndarray


Split = Mapping[str, Stream]
"""The components of a split by name, in the order of their names."""


def open_split(directory: Path, reports: Sequence[dict], dtype: np.dtype) -> Split:
    """Returns the split whose units stand in `directory`.

    Raises InputError for a file that is missing or of another size than when it was written.
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
        own, place = np.fromfile(file.with_suffix(".lengths"), "<u4"), 0
        for name, counts in report["components"].items():
            pieces.setdefault(name, []).append((first, counts["tokens"]))
            lengths.setdefault(name, []).append(own[place : place + counts["documents"]])
            first += -(-counts["tokens"] // CHUNK)
            place += counts["documents"]
    return {
        name: Stream(TokenStream(source, pieces[name], dtype), np.concatenate(lengths[name]).astype(np.int64))
        for name in sorted(pieces)
    }


def _allow_open_files(count: int) -> None:
    """Lets this process keep so many files open at once, as reading them in any order does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(f"{count} files of tokens are to be open at once, but the limit is {hard}: raise `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _check_size(file: Path, expected: int) -> None:
    size = file.stat().st_size if file.exists() else None
    if size != expected:
        raise InputError(
            f"{file} is {'missing' if size is None else f'{size} bytes'}, expected {expected} bytes; remove "
            f"{file.parents[1]}, and the same command makes it again"
        )

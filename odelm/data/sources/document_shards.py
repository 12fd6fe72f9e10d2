"""The documents of a corpus as read from its files, in shards, so that an interruption loses one shard at most.

A shard is some of the source files. Its documents are in one ArrayRecord, with their digests beside it. Reading,
decompressing and checking them is what takes time, and what several processes share.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from odelm.data.shards import record_writer
from odelm.data.sources.documents import BadRecord, Document, Records, digest, tolerant
from odelm.data.sources.files import size_of
from odelm.errors import InputError, nearest
from odelm.files import writing

SHARD_BYTES, MAX_SHARDS = 64 << 20, 1024
MAX_BAD_RECORDS_KEPT = 100
"""Messages about bad records that a shard keeps."""


@dataclass(frozen=True)
class Source:
    """A file of a corpus, or a member of an archive: `size` bytes from `offset`."""

    path: Path
    size: int
    offset: int = 0
    member: str = ""


def whole(files: Sequence[Path]) -> list[Source]:
    """Returns files as sources."""
    return [Source(file, size_of(file)) for file in files]


@dataclass(frozen=True)
class Reading:
    """How to read a corpus: the records of a source, which components to keep, and what to do with a bad record."""

    read: Callable[[Source], Records]
    components: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_bad: bool = False

    def keeps(self, component: str) -> bool:
        return component not in self.exclude and (not self.components or component in self.components)


@dataclass(frozen=True)
class DocumentShard:
    """Some source files, and where their documents are written: a numbered file in `directory`."""

    number: int
    sources: tuple[Source, ...]
    reading: Reading
    directory: Path

    @property
    def path(self) -> Path:
        return self.directory / f"{self.number:05d}.array_record"

    @property
    def report(self) -> Path:
        """Written last: a shard that has its report is complete."""
        return self.path.with_suffix(".json")


def group(sources: Sequence[Source]) -> list[tuple[Source, ...]]:
    """Returns the sources in groups of about `SHARD_BYTES` or more, in order."""
    size = max(SHARD_BYTES, sum(source.size for source in sources) // MAX_SHARDS)
    groups, current, total = [], [], 0
    for source in sources:
        current.append(source)
        total += source.size
        if total >= size:
            groups.append(tuple(current))
            current, total = [], 0
    return [*groups, tuple(current)] if current else groups


def records(sources: Sequence[Source], reading: Reading) -> Iterator[Document | BadRecord]:
    """Yields the records of all components; raises InputError at a bad record unless bad records are skipped."""
    for source in sources:
        for record in tolerant(reading.read(source)):
            if isinstance(record, BadRecord) and not reading.skip_bad:
                raise InputError(f"{record.message} (or skip such records: data.on_bad_record=skip)")
            yield record


def write_document_shard(shard: DocumentShard) -> None:
    """Writes the documents of a shard, their digests, and a report of what was found."""
    digests, names, skipped, bad = [], set(), 0, []
    with writing(shard.path) as partial, record_writer(partial) as writer:
        for record in records(shard.sources, shard.reading):
            if isinstance(record, BadRecord):
                skipped += 1
                bad = [*bad, record.message][:MAX_BAD_RECORDS_KEPT]
                continue
            names.add(record.component)
            if shard.reading.keeps(record.component):
                digests.append(digest(record.text))
                writer.write(record.component.encode() + b"\0" + record.text.encode())
    with writing(shard.path.with_suffix(".digests")) as partial:
        partial.write_bytes(b"".join(digests))
    report = {"documents": len(digests), "components": sorted(names), "bad_records": skipped, "bad": bad}
    with writing(shard.report) as partial:
        partial.write_text(json.dumps(report) + "\n")


@dataclass(frozen=True, eq=False)
class DocumentShards:
    """The written shards of a corpus, and the split of each document."""

    shards: Sequence[DocumentShard]
    digests: np.ndarray
    """uint64 (n, 2), of the documents of all shards in order."""
    first: np.ndarray
    """bool (n,), False at a copy of an earlier document."""
    reports: list[dict]

    def chosen(self, held_out: bool, fraction: float) -> np.ndarray:
        """Returns bool (n,), True at the documents of one split."""
        return self.first & ((self.digests[:, 0] < np.uint64(math.ceil(fraction * 2**64))) == held_out)

    def documents(self, chosen: np.ndarray) -> Iterator[tuple[str, Document]]:
        """Yields (digest in hex, document) where `chosen`, bool (n,), is True."""
        start = 0
        for shard, report in zip(self.shards, self.reports, strict=True):
            count = report["documents"]
            places = np.flatnonzero(chosen[start : start + count])
            if len(places):
                with ArrayRecordDataSource([str(shard.path)]) as source:
                    for place in places.tolist():
                        yield self._hex(start + place), _document(source[place])
            start += count

    def _hex(self, index: int) -> str:
        first, second = self.digests[index].tolist()
        return f"{first:016x}{second:016x}"


def open_document_shards(shards: Sequence[DocumentShard]) -> DocumentShards:
    """Returns the shards, once all are written; raises InputError for a named component that is not among them."""
    reports = [json.loads(shard.report.read_text()) for shard in shards]
    data = b"".join(shard.path.with_suffix(".digests").read_bytes() for shard in shards)
    digests = np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, 2)
    check_components(shards[0].reading, {name for report in reports for name in report["components"]})
    return DocumentShards(shards, digests, first_of_each(digests), reports)


def check_components(reading: Reading, found: Iterable[str]) -> None:
    """Raises InputError for a named component that is not among those found."""
    found = set(found)
    for option in ("components", "exclude"):
        for name in getattr(reading, option):
            if name not in found:
                raise InputError(f"data.{option} names {name!r}, which the corpus lacks: {nearest(name, found)}")


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """Returns bool (n,), True where a row of (n, 2) occurs for the first time."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    in_order = digests[order]
    new = np.ones(len(digests), bool)
    new[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    first = np.zeros(len(digests), bool)
    first[order[new]] = True
    return first


def _document(data: bytes) -> Document:
    component, text = data.split(b"\0", 1)
    return Document(text.decode(), component.decode())

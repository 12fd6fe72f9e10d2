"""Documents of a corpus as they come out of its files, kept part by part, so that an interruption loses one part.

A part is some of the source files. Its documents stand in one ArrayRecord with their digests beside it; reading,
decompressing and checking them is what takes the time, and what several processes share.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from odelm.data.documents import BadRecord, Document, Records, digest, tolerant
from odelm.data.files import size_of
from odelm.data.records import record_writer
from odelm.errors import InputError, nearest
from odelm.files import writing

PART_BYTES, MOST_PARTS = 64 << 20, 1024
TOLD = 100
"""How many bad records of a part are kept word for word."""


@dataclass(frozen=True)
class Source:
    """A file of a corpus, or a member of an archive: `size` bytes, from `offset` on."""

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
class PartJob:
    """One part to write into `directory`."""

    number: int
    sources: tuple[Source, ...]
    reading: Reading
    directory: Path

    @property
    def path(self) -> Path:
        return self.directory / f"{self.number:05d}.array_record"

    @property
    def report(self) -> Path:
        """Written last: a part with its report is whole."""
        return self.path.with_suffix(".json")


def group(sources: Sequence[Source]) -> list[tuple[Source, ...]]:
    """Returns the sources in parts of about `PART_BYTES` or more, in order."""
    size = max(PART_BYTES, sum(source.size for source in sources) // MOST_PARTS)
    parts, part, total = [], [], 0
    for source in sources:
        part.append(source)
        total += source.size
        if total >= size:
            parts.append(tuple(part))
            part, total = [], 0
    return [*parts, tuple(part)] if part else parts


def records(sources: Sequence[Source], reading: Reading) -> Iterator[Document | BadRecord]:
    """Yields what the sources hold, all components; raises InputError at a bad record unless those are skipped."""
    for source in sources:
        for record in tolerant(reading.read(source)):
            if isinstance(record, BadRecord) and not reading.skip_bad:
                raise InputError(f"{record.message} (or leave such records out: data.on_bad_record=skip)")
            yield record


def write_part(job: PartJob) -> None:
    """Writes the documents of a part, their digests, and a report of what was found."""
    digests, names, skipped, bad = [], set(), 0, []
    with writing(job.path) as partial, record_writer(partial) as writer:
        for record in records(job.sources, job.reading):
            if isinstance(record, BadRecord):
                skipped += 1
                bad = [*bad, record.message][:TOLD]
                continue
            names.add(record.component)
            if job.reading.keeps(record.component):
                digests.append(digest(record.text))
                writer.write(record.component.encode() + b"\0" + record.text.encode())
    with writing(job.path.with_suffix(".digests")) as partial:
        partial.write_bytes(b"".join(digests))
    report = {"documents": len(digests), "components": sorted(names), "bad_records": skipped, "bad": bad}
    with writing(job.report) as partial:
        partial.write_text(json.dumps(report) + "\n")


@dataclass(frozen=True, eq=False)
class Parts:
    """All parts of a corpus, written, and which of their documents go where."""

    jobs: Sequence[PartJob]
    digests: np.ndarray
    """uint64 (n, 2), of the documents of all parts in order."""
    first: np.ndarray
    """bool (n,), False at a copy of an earlier document."""
    reports: list[dict]

    def chosen(self, held_out: bool, fraction: float) -> np.ndarray:
        """Returns bool (n,), True at the documents of one split."""
        return self.first & ((self.digests[:, 0] < np.uint64(math.ceil(fraction * 2**64))) == held_out)

    def documents(self, chosen: np.ndarray) -> Iterator[tuple[str, Document]]:
        """Yields (digest in hex, document) of the chosen (n,)."""
        start = 0
        for job, report in zip(self.jobs, self.reports, strict=True):
            count = report["documents"]
            places = np.flatnonzero(chosen[start : start + count])
            if len(places):
                with ArrayRecordDataSource([str(job.path)]) as source:
                    for place in places.tolist():
                        yield self._hex(start + place), _document(source[place])
            start += count

    def _hex(self, index: int) -> str:
        first, second = self.digests[index].tolist()
        return f"{first:016x}{second:016x}"


def read_parts(jobs: Sequence[PartJob]) -> Parts:
    """Returns the parts, once all are written; raises InputError for a component that was named but is not there."""
    reports = [json.loads(job.report.read_text()) for job in jobs]
    data = b"".join(job.path.with_suffix(".digests").read_bytes() for job in jobs)
    digests = np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, 2)
    check_components(jobs[0].reading, {name for report in reports for name in report["components"]})
    return Parts(jobs, digests, first_of_each(digests), reports)


def check_components(reading: Reading, found: Iterable[str]) -> None:
    """Raises InputError for a component that was named but is not among those found."""
    found = set(found)
    for option in ("components", "exclude"):
        for name in getattr(reading, option):
            if name not in found:
                raise InputError(f"data.{option} names {name!r}, which the corpus has not: {nearest(name, found)}")


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """Returns bool (n,), True where a row of (n, 2) stands for the first time."""
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

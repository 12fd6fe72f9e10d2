"""Tasks read from files: JSON lines, ARC's CSV, WikiText's tokens, plain passages, and archives of JSON lines."""

import contextlib
import csv
import json
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from odelm.data.sources.archives import Header
from odelm.data.sources.files import COMPRESSIONS, as_input_error, open_file
from odelm.errors import InputError
from odelm.evals.tasks import formats, wikitext
from odelm.evals.tasks.items import Item, SentencePair, Task

Lines = Iterable[tuple[str, str]]
"""The lines of a file, each after its name in error messages: the file and the line's number."""

ARCHIVES = (".tar", ".tgz")
KINDS = (".jsonl", ".ndjson", ".csv", ".txt", ".tokens", ".raw", *ARCHIVES)
"""Endings of the names of task files, which may be followed by that of a compression."""


def kind_of(path: Path) -> str | None:
    """Returns which of `KINDS` a file's name ends with; None for a file of another kind."""
    return next((kind for kind in KINDS if path.name.lower().endswith(_endings(kind))), None)


def read_file(path: Path, *, limit: int | None = None, name: str | None = None, group: str | None = None) -> list[Task]:
    """Returns the tasks in a file: one, or one for each file of an archive.

    The format is determined by the ending (`.csv`: ARC, `.tokens` and `.raw`: WikiText, `.txt`: a passage a line), or
    by the fields of the first record. A task has the name that is given, else that of its file; a task of sentence
    pairs is part of a group, `blimp` if none is given, and named after its file. Raises InputError, which names the
    file and the line, for a file that is in no known format or cannot be read.
    """
    kind = kind_of(path)
    if kind is None:
        raise InputError(f"{path} is no file of a task; expected one of {', '.join(KINDS)}, compressed or not")
    if kind in ARCHIVES:
        return _archived(path, limit, group)
    lines = _lines(path)
    items = _ITEMS[kind](lines) if kind in _ITEMS else _records(lines, _labels_beside(path))
    return [_task(_stem(path.name), items, limit, name, group, path)]


def _archived(path: Path, limit: int | None, group: str | None) -> list[Task]:
    """Returns the task in each file of an archive; InputError if there is none, or if two would have one name."""
    found: dict[str, Task] = {}
    for part, lines in _members(path):
        if part in found:
            raise InputError(f"{path} has two files that give a task {part}: rename one of them")
        found[part] = _task(part, _records(lines), limit, part, group, path)
    if not found:
        raise InputError(
            f"{path} has no file of JSON lines (.jsonl or .ndjson), which an archive of a task consists of"
        )
    return list(found.values())


def _task(stem: str, items: Iterable[Item], limit: int | None, name: str | None, group: str | None, path: Path) -> Task:
    found = list(islice(items, limit))
    if not found:
        raise InputError(f"{path} has no items: it is empty")
    if isinstance(found[0], SentencePair):
        group = group or "blimp"
        return Task(f"{group}/{stem}", found, str(path), group)
    return Task(name or stem, found, str(path))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with open_file(path) as file:
            yield from _decoded(file, str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def _decoded(file: Iterable[bytes], name: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file, 1):
        place = f"{name}, line {number}"
        try:
            yield place, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{place} is not UTF-8: convert the file (iconv -t UTF-8)") from error


def _members(path: Path) -> Iterator[tuple[str, Iterator[tuple[str, str]]]]:
    """Yields the name and the lines of each file of JSON lines in an archive, in the archive's order."""
    with _damaged(path), open_file(path) as data, tarfile.open(fileobj=data, mode="r|*", tarinfo=Header) as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None and name.endswith((".jsonl", ".ndjson")) and not name.startswith("."):
                yield _stem(name), _member_lines(file, path, member.name)


def _member_lines(file: Iterable[bytes], path: Path, member: str) -> Iterator[tuple[str, str]]:
    # The caller reads these lines outside `_members`, so `_members` does not see errors of damage here.
    with _damaged(path):
        yield from _decoded(file, f"{path}, {member}")


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Turns the errors of a damaged archive into an InputError that names it."""
    try:
        with as_input_error(path):
            yield
    except tarfile.TarError as error:
        raise InputError(f"{path} cannot be read to its end ({error}): copy or make it again") from error


def _records(lines: Lines, labels: Iterator[tuple[str, str]] | None = None) -> Iterator[Item]:
    """Yields the items of JSON lines, all in the format of the first; `labels` has a line for each item, if the labels
    are in a separate file.

    Blank lines are skipped.
    """
    known = None
    for place, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place} is not JSON ({error}); expected one object a line") from error
        with _at(place):
            known = known or formats.format_of(record)
            missing = [field for field in known.fields if not isinstance(record, dict) or field not in record]
            if missing:
                raise InputError(f"has no {', '.join(missing)}, which the format {known.name} of the first line has")
            if labels is not None:
                record = {"label": next(labels, ("", "none"))[1].strip()} | record
            yield known.read(record)
    place, label = next(labels or iter(()), ("", ""))
    if label.strip():
        raise InputError(f"{place} is a label without a question: expected one for each")


def _labels_beside(path: Path) -> Iterator[tuple[str, str]] | None:
    """Returns the lines of PIQA's file of labels for a file of questions: `dev-labels.lst` for `dev.jsonl`."""
    labels = path.with_name(f"{_stem(path.name)}-labels.lst")
    return _lines(labels) if labels.is_file() else None


def _arc_rows(lines: Lines) -> Iterator[Item]:
    """Yields the questions of ARC as CSV without a header: the question, its choices, and the right one's letter or
    number.

    A question with fewer choices has empty columns after them. A question without any choice, as in some copies, is
    skipped, and a line on standard error reports how many there were.
    """
    left_out, place = 0, ""
    for place, row in _csv_rows(lines):
        with _at(place):
            if len(row) < 4:
                raise InputError(f"has {len(row)} columns, expected a question, two or more choices and the answer")
            asked, *choices, key = row
            while choices and not choices[-1].strip():
                choices.pop()
            labels = "123456789" if key.strip().isdecimal() else "ABCDEFGHI"
            if choices:
                yield formats.keyed(asked, tuple(choices), [*labels[: len(choices)]], key.strip())
            else:
                left_out += 1
    if left_out:
        print(f"{place.partition(', line')[0]}: questions without choices are left out: {left_out}", file=sys.stderr)


def _csv_rows(lines: Lines) -> Iterator[tuple[str, list[str]]]:
    place = ""

    def texts() -> Iterator[str]:
        nonlocal place
        for where, line in lines:
            place = where
            yield line

    try:
        for row in csv.reader(texts(), strict=True):
            yield place, row
    except csv.Error as error:
        raise InputError(f"{place} is not CSV ({error})") from error


def _passages(lines: Lines) -> Iterator[Item]:
    for place, line in lines:
        if line.strip():
            with _at(place):
                yield formats.passage({"text": line.rstrip()})


def _pages(lines: Lines) -> Iterator[Item]:
    return map(wikitext.page_of, wikitext.pages(line for _, line in lines))


_ITEMS: dict[str, Callable[[Lines], Iterator[Item]]] = {
    ".csv": _arc_rows,
    ".txt": _passages,
    ".tokens": _pages,
    ".raw": _pages,
}


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """Puts the place in front of an error that was found there."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place} {error}") from error


def _stem(name: str) -> str:
    """Returns a file's name without its endings of `KINDS` and compression."""
    endings = (ending for kind in KINDS for ending in _endings(kind))
    ending = max((ending for ending in endings if name.lower().endswith(ending)), key=len)
    return name[: -len(ending)]


def _endings(kind: str) -> tuple[str, ...]:
    return tuple(f"{kind}{compression}" for compression in COMPRESSIONS)

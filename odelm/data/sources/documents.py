"""Documents: a Python source file, a .txt file, a line of a .jsonl file, a file in a tar; and the split of each."""

import hashlib
import json
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from odelm.data.sources.files import JSONL_ENDINGS, PARQUET_ENDINGS, as_system_failure, open_file, shown, stem
from odelm.errors import InputError, SystemFailure
from odelm.files import whole_characters


class Document(NamedTuple):
    """A text, never blank, and the part of its corpus that it is from."""

    text: str
    component: str


class BadRecord(NamedTuple):
    """A record that could not be read: one line that says where and why."""

    message: str


Records = Iterator[Document | BadRecord]


def checked(records: Iterable[Document | BadRecord]) -> Iterator[Document]:
    """Yields the documents; raises InputError at the first bad record."""
    for record in records:
        if isinstance(record, BadRecord):
            raise InputError(record.message)
        yield record


def tolerant(records: Records) -> Records:
    """Yields the records; a file that cannot be read to its end gives a bad record as its last one.

    An I/O failure of the system is not a bad record: it raises SystemFailure.
    """
    try:
        yield from records
    except SystemFailure:
        raise
    except InputError as error:
        yield BadRecord(str(error))


def python_documents(path: Path, component: str) -> Records:
    """Yields the file's text by its own encoding declaration; nothing if it does not decode (test data)."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        text.encode()
    except (SyntaxError, UnicodeError):
        return
    if text.strip():
        yield Document(text, component)


def text_documents(path: Path, field: str = "text") -> Records:
    """Yields the documents of a .txt, JSON lines or Parquet file, compressed or not; blank ones are left out.

    The component is the file's name without its endings, for .txt its folder's name. A record that is not UTF-8, is not
    a JSON object or lacks the `field` is a bad record that names the file and the line; a file that ends early raises
    InputError after its whole documents.
    """
    name = path.name.lower()
    if name.endswith(JSONL_ENDINGS):
        component = stem(path)
        yield from _lines(path, lambda value, place: component, field)
    elif name.endswith(PARQUET_ENDINGS):
        yield from parquet_documents(path, field)
    else:
        with open_file(path) as file:
            yield from whole_file(file.read(), str(path), shown(path.parent.name))


def parquet_documents(path: Path, field: str) -> Records:
    """Yields the texts of a column of a Parquet file; a row without one is a bad record.

    Raises InputError for a damaged file, after yielding the texts before the damage.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path} needs the library pyarrow: pip install pyarrow") from error
    number = 0
    with as_system_failure(path):
        try:
            file = parquet.ParquetFile(path)
            if field not in file.schema_arrow.names:
                raise InputError(
                    f"{path} has no column {field!r}, but {', '.join(file.schema_arrow.names)}: set data.text_field"
                )
            for batch in file.iter_batches(1024, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    yield from _row(value.as_py, f"{path}, row {number}", field, stem(path))
        # An OSError with a number is from the system; one without means damaged pages.
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise InputError(f"{path} cannot be read to its end ({error}); copy or make it again") from error


def _row(read: Callable[[], object], place: str, field: str, component: str) -> Records:
    try:
        text = read()
    except UnicodeDecodeError:
        yield BadRecord(f"{place}: {field!r} is not UTF-8; write it again")
        return
    if not isinstance(text, str):
        yield BadRecord(f"{place}: {field!r} is {type(text).__name__}, expected a text")
    elif text.strip():
        yield Document(text, component)


def pile_documents(path: Path) -> Records:
    """Yields the documents of a shard of the Pile, the component being its `meta.pile_set_name`."""
    yield from _lines(path, _pile_set_name, "text")


def labelled(records: Records, component: str) -> Records:
    """Yields the records, with `component` as the component of each document."""
    for record in records:
        yield record if isinstance(record, BadRecord) else Document(record.text, component)


def whole_file(data: bytes, place: str, component: str) -> Records:
    """Yields `data` as one document, nothing if it is blank, a bad record if it is not UTF-8."""
    try:
        text = _decode(data, place)
    except InputError as error:
        yield BadRecord(str(error))
        return
    if text.strip():
        yield Document(text, component)


def digest(text: str) -> bytes:
    """Returns the 16 bytes that identify a document: its split, its order and whether it is a copy depend on them."""
    return hashlib.sha256(text.encode()).digest()[:16]


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Returns whether the document with this digest is in the validation split: a function of its text only, so that
    identical documents are always in the same split."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _lines(path: Path, component_of: Callable[[dict, str], str], field: str) -> Records:
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                value = _json_object(line, place, field)
                if value is not None and value[field].strip():
                    yield Document(value[field], component_of(value, place))
            except InputError as error:
                yield BadRecord(str(error))


def _pile_set_name(value: dict, place: str) -> str:
    meta = value.get("meta")
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    if not isinstance(name, str) or not name:
        raise InputError(f'{place} has no "meta": {{"pile_set_name": "..."}}, but only {", ".join(value)}')
    if not name.isprintable():
        raise InputError(f"{place}: the name {name!r} of its set is no plain text; write it in letters")
    return name


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = place if ", line " in place else f"{place}, line {line}"
        raise InputError(
            f"{place}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file to UTF-8 (iconv -t UTF-8)"
        ) from error


def _json_object(line: bytes, place: str, field: str) -> dict | None:
    """Returns the object of one line, which has a string `field`; None for a blank line."""
    decoded = _decode(line, place)
    if not decoded.strip():
        return None
    try:
        value = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{place} is not JSON ({error}); expected one object a line, {{"{field}": ...}}') from error
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        there = ""
        if isinstance(value, dict) and value:
            there = f": it is {type(text).__name__}" if field in value else f", but {', '.join(value)}"
        raise InputError(
            f'{place} has no string "{field}"{there}; expected one object a line, {{"{field}": "..."}}, or the name of '
            "its text in data.text_field"
        )
    whole_characters(f'{place}: "{field}"', text)
    return value

"""What one document is: a Python source file, a .txt file, a line of a .jsonl file; and its split."""

import hashlib
import json
import tokenize
from collections.abc import Iterator
from pathlib import Path

from odelm.data.files import COMPRESSIONS, open_file
from odelm.errors import InputError

JSONL_ENDINGS = tuple(f".jsonl{compression}" for compression in COMPRESSIONS)


def python_documents(path: Path) -> Iterator[str]:
    """Yields the file's text by its own encoding declaration; nothing if it does not decode (test data)."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        text.encode()
    except (SyntaxError, UnicodeError):
        return
    yield text


def text_documents(path: Path) -> Iterator[str]:
    """Yields the documents of a .txt or .jsonl file, compressed or not; blank ones are left out.

    Raises InputError, naming the file and the line, for what is not UTF-8, not a JSON object or has no "text".
    """
    with open_file(path) as file:
        if path.name.endswith(JSONL_ENDINGS):
            texts = (_json_text(line, f"{path}, line {number}") for number, line in enumerate(file, 1))
        else:
            texts = iter([_decode(file.read(), str(path))])
        yield from (text for text in texts if text.strip())


def is_held_out(text: str, fraction: float) -> bool:
    """Tells whether a document is of the validation split: a function of its text alone, so that identical
    documents are always on the same side."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return number < fraction * 2**64


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = place if ", line " in place else f"{place}, line {line}"
        raise InputError(
            f"{place}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file to UTF-8 (iconv -t UTF-8)"
        ) from error


def _json_text(line: bytes, place: str) -> str:
    """Returns the field "text" of one line; the empty string for a blank line."""
    decoded = _decode(line, place)
    if not decoded.strip():
        return ""
    try:
        value = json.loads(decoded)
    except ValueError as error:
        raise InputError(f'{place} is not JSON ({error}); expected one object a line, {{"text": ...}}') from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{place} has no string "text"; expected one object a line, {{"text": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f'{place}: "text" is not UTF-8 (an unpaired surrogate); write the character whole') from error
    return text

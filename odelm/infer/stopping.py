"""Where a text ends before its last token, and which part of a growing text no longer changes."""

from collections.abc import Iterable, Sequence
from typing import Any

from odelm.errors import InputError

CUT_CHARACTER = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to, while its other bytes are missing."""


def stop_strings(stop: Any, *, has_tokenizer: bool) -> list[str]:
    """Returns the strings that end a text as a list; InputError for invalid ones, and if there is no tokenizer to find
    them with."""
    strings = list(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else [stop]
    wrong = [string for string in strings if not isinstance(string, str) or not string]
    if wrong:
        raise InputError(f"stop has {wrong[0]!r}, expected strings of at least one character")
    if strings and not has_tokenizer:
        raise InputError("stop has strings, but the generator has no tokenizer to find them with")
    return strings


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Returns the text before the first of the strings in it, and whether it has one."""
    places = [text.find(string) for string in stop if string in text]
    return (text[: min(places)], True) if places else (text, False)


def certain(text: str, stop: Sequence[str]) -> str:
    """Returns the part of a text that no later token can take back: without an ending that may begin one of the
    strings, and without the first bytes of a character."""
    begun = [n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])]
    return text[: len(text) - max(begun, default=0)].rstrip(CUT_CHARACTER)

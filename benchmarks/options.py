"""The kinds of values that options of the benchmarks have, as the `type` of argparse: it reports a mistake in one line,
with status 2."""

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from odelm.errors import nearest

Value = TypeVar("Value")


class Size(NamedTuple):
    """Two whole numbers, such as the rows and the length of a batch, written 32x512."""

    first: int
    second: int

    def __str__(self) -> str:
        return f"{self.first}x{self.second}"


def whole(text: str) -> int:
    """Returns a whole number of at least 1."""
    return _read(int, text, lambda value: value >= 1, "a whole number of at least 1")


def positive(text: str) -> float:
    """Returns a number above 0."""
    return _read(float, text, lambda value: value > 0, "a number above 0, such as 0.5")


def size(text: str) -> Size:
    """Returns the two numbers of such as 32x512."""

    def parsed(text: str) -> Size:
        first, second = map(int, text.split("x"))
        return Size(first, second)

    return _read(parsed, text, lambda value: min(value) >= 1, "two whole numbers of at least 1, such as 32x512")


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Returns what takes one of some names."""
    names = tuple(names)

    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; {nearest(text, names)}")
        return text

    return name


def several(
    one: Callable[[str], Value], count: int | None = None, *, separator: str = ","
) -> Callable[[str], list[Value]]:
    """Returns what takes separated values, `count` of them or at least one, each as `one` takes it."""

    def values(text: str) -> list[Value]:
        parts = [part.strip() for part in text.split(separator)]
        if count not in (None, len(parts)):
            raise argparse.ArgumentTypeError(f"{text!r} is given, expected {count} values separated by {separator!r}")
        return [one(part) for part in parts]

    return values


def numbers_by_name(names: Iterable[str]) -> Callable[[str], dict[str, Any]]:
    """Returns what takes an object of JSON whose names are some of these."""
    known = one_of(names)

    def read(text: str) -> dict[str, Any]:
        found = _read(json.loads, text, lambda value: isinstance(value, dict), 'an object of JSON, such as {"ring": 3}')
        return {known(name): value for name, value in found.items()}

    return read


def written(value: object) -> str:
    """Returns a value as its option is written on a command line."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _read(parse: Callable[[str], Value], text: str, fits: Callable[[Value], bool], expected: str) -> Value:
    try:
        value = parse(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is given, expected {expected}")
    return value

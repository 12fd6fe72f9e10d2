"""Checks of the arguments of a call, one for each kind of value; the options of a config have `odelm.config.checks`."""

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

from odelm.errors import InputError


def whole(name: str, value: Any, *, least: int = 1, most: int | None = None, expected: str = "") -> int:
    """Returns a whole number from `least` to `most`, such as `np.int64(3)`, as an int; InputError for anything else.

    `expected` is the range in words, if numbers do not say it. True and False are refused.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        from jax.core import Tracer  # JAX takes long to import, and tokenizers are prepared without it

        known = f"of at least {least}" if most is None else f"from {least} to {most}"
        traced = ", known when the code is traced" if isinstance(value, Tracer) else ""
        raise InputError(f"{name} is {shown(value)}, expected {expected or f'a whole number {known}'}{traced}")
    return number


def wholes(name: str, values: Any, *, most: int | None = None, expected: str = "") -> list[int]:
    """Returns whole numbers of at least 1, at least one of them; `most` and `expected` are as of `whole`."""
    numbers = listed(name, values, "whole numbers in brackets, such as [1, 8]")
    return [whole(f"{name}[{i}]", value, most=most, expected=expected) for i, value in enumerate(numbers)]


def number(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> float:
    """Returns a number that `fits`, as a float; InputError for another one, and for what is none."""
    try:
        found = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if math.isnan(found) or not fits(found):
        raise InputError(f"{name} is {shown(value)}, expected {expected}")
    return found


def listed(name: str, values: Any, expected: str) -> list[Any]:
    """Returns the values of a list, an array or an iterator, at least one; InputError for other things.

    Sets and dicts are refused, because their order says nothing.
    """
    unordered = isinstance(values, str | bytes | dict | set | frozenset)
    if unordered or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise InputError(f"{name} is {shown(values)}, expected {expected}")
    found = list(values)
    if not found:
        raise InputError(f"{name} is empty: give at least one")
    return found


def of_class(name: str, value: Any, kind: type, expected: str) -> None:
    """Raises InputError for a value of another class."""
    if not isinstance(value, kind):
        given = shown(value) if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"
        raise InputError(f"{name} is {given}, expected {expected}")


def shown(value: Any) -> str:
    """Returns a value as an error shows it: strings quoted, and long values cut."""
    return f"{value!r:.60}" if isinstance(value, str) else f"{value!s:.60}"

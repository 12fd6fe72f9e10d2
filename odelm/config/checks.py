"""Checks of option values: each raises InputError naming the option, its value and what would do."""

import math
import types
import typing
from collections.abc import Iterable
from typing import Any

from odelm.errors import InputError, nearest


def check_types(config: Any, path: str) -> None:
    """Checks every field of a config dataclass against its annotation; floats have to be finite."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not is_a(value, hint):
            expected = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
            expected = f"a finite {expected}" if hint is float else expected
            raise InputError(f"{path}.{name} is {value!r} ({type(value).__name__}), expected {expected}")


def is_a(value: Any, hint: Any) -> bool:
    """Tells whether a value is of an annotated type: a class, a union, or a tuple of one type (a list will do)."""
    if isinstance(hint, types.UnionType):
        return any(is_a(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (tuple, list)) and all(is_a(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def choice(path: str, value: str, choices: Iterable[str]) -> None:
    """Checks that a value is one of `choices`."""
    if value not in choices:
        raise InputError(f"{path} is {value!r}; {nearest(value, choices)}")


def positive(path: str, value: int) -> None:
    """Checks that a number is above zero."""
    if value <= 0:
        raise InputError(f"{path} is {value}, expected a positive whole number")


def within(path: str, value: float, low: float, high: float) -> None:
    """Checks that `low <= value < high`."""
    if not low <= value < high:
        raise InputError(f"{path} is {value}, expected at least {low} and below {high}")


def divides(small_path: str, small: int, large_path: str, large: int) -> None:
    """Checks that one number divides another."""
    if large % small:
        raise InputError(
            f"{small_path} is {small}, which does not divide {large_path} ({large}); "
            f"the nearest that does is {nearest_divisor(large, small)}"
        )


def nearest_divisor(number: int, near: int) -> int:
    """Returns the divisor of `number` that is nearest to `near`."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - near))

"""Checks of option values: each raises InputError naming the option, its value and what is valid."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from typing import Any

from odelm.errors import InputError, nearest


def freeze_lists(config: Any) -> None:
    """Replaces each list by a tuple where a tuple is annotated, so that the config hashes; for `__post_init__`."""
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if typing.get_origin(option.type) is tuple and isinstance(value, list):
            object.__setattr__(config, option.name, tuple(value))


def check_types(config: Any, path: str) -> None:
    """Checks every field of a config dataclass against its annotation; floats must be finite."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not is_a(value, hint):
            expected = f"a finite {type_name(hint)}" if hint is float else type_name(hint)
            raise InputError(f"{path}.{name} is {value!r} ({type(value).__name__}), expected {expected}")


def is_a(value: Any, hint: Any) -> bool:
    """Returns whether a value has an annotated type: a class, a union, or a tuple of one type."""
    if isinstance(hint, types.UnionType):
        return any(is_a(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(is_a(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """Returns an annotated type as written, such as `int | None`."""
    return str(hint) if typing.get_args(hint) else getattr(hint, "__name__", str(hint))


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

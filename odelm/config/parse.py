"""Option values as text, such as those of `--config.train.updates=1000`, parsed by the type of the option."""

import ast
import types
import typing
from typing import Any

from odelm.config.checks import type_name

BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def parse_value(text: str, hint: Any) -> Any:
    """Returns the value of an option of type `hint` (int, float, bool, str, a tuple of one of them, or one or None).

    A tuple is written as `3,4` or as Python writes it; `none` is None. Raises ValueError for any other text.
    """
    if isinstance(hint, types.UnionType):
        if text.lower() == "none":
            return None
        (hint,) = (choice for choice in typing.get_args(hint) if choice is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return tuple(parse_value(item, typing.get_args(hint)[0]) for item in _items(text))
    if hint is bool:
        if text.lower() not in BOOLS:
            raise ValueError(f"{text!r} is not a bool: expected true or false")
        return BOOLS[text.lower()]
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"{text!r} is not of type {type_name(hint)}") from None


def _items(text: str) -> list[str]:
    """Returns the items of a tuple, each as text."""
    text = text.strip()
    if text[:1] in ("(", "["):
        try:
            literal = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            raise ValueError(f"{text!r} is not a tuple: expected items such as 3,4") from None
        return [str(item) for item in (literal if isinstance(literal, tuple | list) else (literal,))]
    return [item for item in (item.strip() for item in text.split(",")) if item]

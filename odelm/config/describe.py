"""What each option means, said once: under its field. Read from there by `help`, `--help` and docs/options.md."""

import ast
import functools
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from odelm.config.checks import type_name

T = TypeVar("T")
WIDTH, MARKDOWN_WIDTH = 100, 120


@dataclass(frozen=True)
class Option:
    """An option of a part of a config."""

    name: str
    type: str
    default: Any
    meaning: str


def options_of(part: type) -> Iterator[Option]:
    """Yields the options of a config dataclass, in their order; `meaning` is the text under the field."""
    hints, texts = typing.get_type_hints(part), _texts(part.__module__).get(part.__name__, {})
    for field in fields(part):
        yield Option(field.name, type_name(hints[field.name]), field.default, texts.get(field.name, ""))


def described(part: type[T]) -> type[T]:
    """Adds what each option means to the docstring of a config dataclass, where `help` shows it."""
    listed = [inspect.cleandoc(part.__doc__ or ""), "", "Options:"]
    for option in options_of(part):
        listed.append(f"    {option.name}: {option.type} = {option.default!r}")
        listed += textwrap.wrap(option.meaning, WIDTH, initial_indent=8 * " ", subsequent_indent=8 * " ")
    part.__doc__ = "\n".join(listed)
    return part


def as_help(config: Any) -> str:
    """Returns the options of a whole config as `--help` shows them, with its values as their defaults."""
    lines = []
    for part in fields(config):
        values = getattr(config, part.name)
        for option in options_of(type(values)):
            value = shown(getattr(values, option.name))
            lines.append(f"  --config.{part.name}.{option.name}={value}  ({option.type})")
            lines += textwrap.wrap(option.meaning, WIDTH, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return "\n".join(lines)


def as_markdown(config: Any) -> str:
    """Returns the options of a whole config as a Markdown document."""
    lines = [
        "# Options",
        "",
        "Every option of a recipe, with its type and its default; a recipe sets its own. On the command line an option",
        "is `--config.NAME=VALUE`: a tuple is written `3,6`, an empty one as nothing, and None as `none`. `python",
        "train.py --help` prints this list, and `help(odelm.ModelConfig)` a part of it. The document is made by",
        "`python -m odelm.config > docs/options.md`.",
    ]
    for part in fields(config):
        values = getattr(config, part.name)
        summary = (inspect.getdoc(type(values)) or "").partition("\n\nOptions:")[0]
        lines += ["", f"## {part.name}", "", *textwrap.wrap(summary, MARKDOWN_WIDTH), ""]
        for option in options_of(type(values)):
            value = shown(getattr(values, option.name))
            item = f"- `{part.name}.{option.name}`, {option.type}, `{value or 'empty'}`: {option.meaning}"
            lines += textwrap.wrap(
                item, MARKDOWN_WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
            )
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """Returns an option's value as it is given on the command line."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def _texts(module: str) -> dict[str, dict[str, str]]:
    """Returns the text under each field of each class of a module; nothing where its source is not kept."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    return {
        part.name: {
            field.target.id: " ".join(text.value.value.split())
            for field, text in zip(part.body, part.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
        }
        for part in tree.body
        if isinstance(part, ast.ClassDef)
    }

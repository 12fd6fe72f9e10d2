"""A recipe as JSON, and how two recipes differ."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from odelm.config.recipe import Config
from odelm.errors import InputError, nearest

T = TypeVar("T")


def to_json(config: Any) -> str:
    """Returns the config (whole, or one part) as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(cls: type[T], values: dict[str, Any], path: str = "config") -> T:
    """Builds a config dataclass from plain values; an unknown key or a wrong type raises InputError."""
    if not isinstance(values, dict):
        raise InputError(f"{path} is {values!r} ({type(values).__name__}), expected an object of options")
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        name = sorted(unknown)[0]
        raise InputError(f"{path}.{name} is not an option; {nearest(name, hints)}")
    parts = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(typing.cast(type, hint), value, f"{path}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        parts[name] = value
    return cls(**parts)


def from_json(text: str) -> Config:
    """Reads what `to_json` wrote and validates it; raises InputError on anything else."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"the config is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"the config is a JSON {type(values).__name__}, expected an object")
    return from_dict(Config, values).validate()


def replace(config: Config, options: Mapping[str, Any]) -> Config:
    """Returns the config with options replaced by their paths, such as `{"model.width": 64}`; it is not validated.

    Raises InputError for a path that names no option.
    """
    parts = {part.name: getattr(config, part.name) for part in dataclasses.fields(Config)}
    for path, value in options.items():
        part, _, name = path.partition(".")
        if part not in parts:
            raise InputError(f"config has no option {part!r}; {nearest(part, parts)}")
        names = [option.name for option in dataclasses.fields(parts[part])]
        if name not in names:
            raise InputError(f"config.{part} has no option {name!r}; {nearest(name, names)}")
        parts[part] = dataclasses.replace(parts[part], **{name: value})
    return Config(**parts)


def differences(saved: Config, given: Config, ignored: frozenset[str]) -> list[str]:
    """Returns "path: saved -> given" for every option that differs, apart from the ignored paths."""
    found = []
    for part in dataclasses.fields(Config):
        old, new = getattr(saved, part.name), getattr(given, part.name)
        for option in dataclasses.fields(old):
            path = f"{part.name}.{option.name}"
            before, after = getattr(old, option.name), getattr(new, option.name)
            if path not in ignored and before != after:
                found.append(f"{path}: {before!r} -> {after!r}")
    return found

"""A recipe as JSON with a version, as options by their paths, and how two recipes differ."""

import dataclasses
import json
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from odelm.config.model import ModelConfig
from odelm.config.recipe import Config
from odelm.config.step_sampling import default_steps
from odelm.errors import InputError, nearest

T = TypeVar("T")

VERSION = 2
"""Of the JSON of a whole config. Version 0 wrote none."""

FORMER_DEFAULTS: dict[int, dict[str, Any]] = {
    0: {
        "step_sampling.kind": "random_count",
        "step_sampling.counts": (3, 4, 6, 12),
        "step_sampling.weights": (),
        "step_sampling.low": 0.5,
        "step_sampling.high": 1.5,
        "step_sampling.jitter": 0.0,
        "step_sampling.anneal": 0.0,
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup": 100,
        "optimizer.warmup_from_zero": True,
        "optimizer.decay": "cosine",
        "optimizer.final_fraction": 0.1,
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.95,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.1,
        "optimizer.clip_norm": 1.0,
        "train.updates": 600,
        "train.batch_size": 16,
        "train.length": 128,
        "train.seed": 0,
    },
    1: {"optimizer.warmup_from_zero": True},
}
"""For each version, what an option meant that a file of that version leaves out, whatever its default is today.

An option that is added later and whose default changes what old runs did gets a line for every version before it.
"""


DROPPED_OPTIONS: dict[str, str] = {}
"""Options that a file may still have, by path, and what became of them: read with a word, and left out."""


def to_json(config: Any) -> str:
    """Returns the config (whole, or one part) as indented JSON; a whole one begins with its version."""
    version = {"version": VERSION} if isinstance(config, Config) else {}
    return json.dumps(version | dataclasses.asdict(config), indent=2) + "\n"


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
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(typing.cast(type, hints[name]), value, f"{path}.{name}")
        parts[name] = value
    return cls(**parts)


def from_json(text: str) -> Config:
    """Reads what `to_json` wrote, in this version or an earlier one, and validates it.

    Raises InputError on anything else, a later version included.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"the config is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"the config is a JSON {type(values).__name__}, expected an object")
    version = values.pop("version", 0)
    if not isinstance(version, int) or not 0 <= version <= VERSION:
        raise InputError(
            f"the config has version {version!r}, but this odelm reads versions 0 to {VERSION}: update odelm"
        )
    _leave_out_dropped(values)
    if version == 0:
        _keep_former_counts(values)
    for path, value in FORMER_DEFAULTS.get(version, {}).items():
        part, _, name = path.partition(".")
        options = values.setdefault(part, {})
        if isinstance(options, dict):
            options.setdefault(name, value)
    return from_dict(Config, values).validate(saved=True)


def _leave_out_dropped(values: dict[str, Any]) -> None:
    for path, why in DROPPED_OPTIONS.items():
        part, _, name = path.partition(".")
        options = values.get(part)
        if isinstance(options, dict) and name in options:
            del options[name]
            print(f"the config has {path}, which is no option any more: {why}", file=sys.stderr)


def _keep_former_counts(values: dict[str, Any]) -> None:
    """Names the counts that a config of version 0 left open: they were exact parts of the depth then."""
    try:
        model = from_dict(ModelConfig, values.get("model", {})).validate()
    except InputError:
        return
    sampling = values.get("step_sampling", {})
    if not isinstance(sampling, dict) or sampling.get("kind") == "fixed" or sampling.get("anneal"):
        return
    if sampling.get("counts") == []:
        parts = {model.depth // part for part in (1, 2, 3, 4) if model.depth % part == 0}
        former = tuple(sorted((count for count in parts if count % model.groups == 0), reverse=True))
        if former != default_steps(model):
            sampling["counts"] = list(former)


def options() -> Iterator[tuple[str, Any]]:
    """Yields the path of every option, such as `model.width`, and its annotated type."""
    for part, hint in typing.get_type_hints(Config).items():
        for name, option in typing.get_type_hints(hint).items():
            yield f"{part}.{name}", option


def check_option(path: str) -> None:
    """Raises InputError for a path that names no option, with the nearest one that exists."""
    parts = typing.get_type_hints(Config)
    part, _, name = path.partition(".")
    if part not in parts:
        raise InputError(f"config has no option {part!r}; {nearest(part, parts)}")
    names = typing.get_type_hints(parts[part])
    if name not in names:
        raise InputError(f"config.{part} has no option {name!r}; {nearest(name, names)}")


def replace(config: Config, options: Mapping[str, Any]) -> Config:
    """Returns the config with options replaced by their paths, such as `{"model.width": 64}`; it is not validated.

    Raises InputError for a path that names no option.
    """
    parts: dict[str, dict[str, Any]] = {}
    for path, value in options.items():
        check_option(path)
        part, _, name = path.partition(".")
        parts.setdefault(part, {})[name] = value
    changed = {part: dataclasses.replace(getattr(config, part), **values) for part, values in parts.items()}
    return dataclasses.replace(config, **changed)


def changed_options(saved: Config, given: Config, ignored: frozenset[str]) -> list[str]:
    """Returns "path: saved -> given" for every option that differs, apart from the ignored paths."""
    found = []
    for path, _ in options():
        part, _, name = path.partition(".")
        before, after = getattr(getattr(saved, part), name), getattr(getattr(given, part), name)
        if path not in ignored and before != after:
            found.append(f"{path}: {before!r} -> {after!r}")
    return found

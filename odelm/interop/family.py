"""What differs from one family of Hugging Face models to the next, and what they have in common."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from odelm.config import ModelConfig
from odelm.errors import InputError, nearest
from odelm.interop.tensors import Entry
from odelm.models import CausalLM, Classifier, Encoder, MaskedLM

Model = CausalLM | MaskedLM | Classifier | Encoder
FolderConfig = dict[str, Any]

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""The names of activations in folders, and ours for the same formulas."""

WRITTEN_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "relu2": "relu2", "silu": "silu"}


@dataclass(frozen=True, eq=False)
class Family:
    """One `model_type` of transformers."""

    model_type: str
    prefix: str
    """The prefix of the names of the body's tensors where there is a head beside it."""
    architectures: Mapping[str, type]
    """The class of ours for each class of transformers' that can be read."""
    model_config: Callable[[FolderConfig], ModelConfig]
    """From a folder's config to the body's; the tensors show which heads there are. Raises InputError for options with
    no equivalent."""
    folder_config: Callable[[ModelConfig], FolderConfig]
    """The inverse, for a config that `obstacles` lets pass."""
    obstacles: Callable[[ModelConfig], list[str]]
    """The options, as `field=value (why)`, for which the family has no equivalent."""
    entries: Callable[[Model], list[Entry]]
    order: str
    """The prefix of the names of the sentence-order head's tensors; empty if there is none."""
    sizes: tuple[str, ...]
    """The fields of the folder's config that determine shapes."""
    ignored: re.Pattern[str]
    """Names of tensors that are not parameters, such as masks."""
    duplicates: Mapping[str, str]
    """Tensors that repeat another one where the readout is tied."""
    heads: tuple[str, ...]
    """Prefixes of the names of tensors of heads and poolers: a folder may have more heads than it uses."""
    prepared: Callable[[FolderConfig, dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda config, tensors: tensors
    """Changes the tensors so that options of the config that we lack are part of them."""


def number(config: FolderConfig, field: str, default: int) -> int:
    """Returns a whole number above zero of a folder's config, or raises InputError."""
    value = config.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{field} is {value!r} in config.json, expected a whole number above 0")
    return value


def share(config: FolderConfig, field: str, default: float) -> float:
    """Returns a number from 0 to below 1 of a folder's config, or raises InputError."""
    value = config.get(field, default)
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{field} is {value!r} in config.json, expected a number from 0 to below 1")
    return float(value)


def flag(config: FolderConfig, field: str, default: bool) -> bool:
    """Returns a truth value of a folder's config, or raises InputError."""
    value = config.get(field, default)
    if not isinstance(value, bool):
        raise InputError(f"{field} is {value!r} in config.json, expected true or false")
    return value


def activation(config: FolderConfig, field: str, default: str) -> str:
    """Returns our name of a folder's activation, or raises InputError."""
    name = config.get(field, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise InputError(f"{field} is {name!r}, which has no equivalent here; {nearest(str(name), ACTIVATIONS)}")
    return ACTIVATIONS[name]


def refuse(config: FolderConfig, fields: Mapping[str, Any]) -> None:
    """Raises InputError if a field of a folder's config has a value other than the only supported one."""
    for field, supported in fields.items():
        if config.get(field, supported) != supported:
            raise InputError(f"{field} is {config[field]!r} in config.json; only {supported!r} is supported")


def common_obstacles(config: ModelConfig) -> list[str]:
    """Returns the options with no equivalent in any family here."""
    found = []
    if config.norm != "layernorm":
        found.append(f"norm={config.norm} (only layernorm)")
    if config.qk_norm:
        found.append("qk_norm=True")
    if config.positions == "rotary":
        found.append("positions=rotary (only learned, or sinusoidal as a table)")
    if config.activation not in WRITTEN_ACTIVATIONS:
        found.append(f"activation={config.activation}")
    if config.key_value_heads != config.heads:
        found.append(f"kv_heads={config.kv_heads} (only as many as heads)")
    if config.kv_span > 1:
        found.append(f"kv_span={config.kv_span} (only 1: every layer has keys and values of its own)")
    if config.lanes > 1:
        found.append(f"lanes={config.lanes}")
    if config.reference_width is not None:
        found.append(f"reference_width={config.reference_width} (which scales the embeddings)")
    if config.parallel_branches:
        found.append("parallel_branches=True")
    return found

"""The files of a Hugging Face folder: `config.json`, safetensors, `tokenizer.json`. Nothing in it is executed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from odelm.errors import InputError

CONFIG, TENSORS, INDEX, TOKENIZER = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
)
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
FLOATS = ("float16", "bfloat16", "float32", "float64")
FLOATS_ONLY = f"expected one of {', '.join(FLOATS)}: save the model without quantisation"
BUFFERS = ("position_ids", "token_type_ids", "attn.bias", "attn.masked_bias")
"""Suffixes of the names of tensors that are not parameters, which may be of any dtype."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def is_folder(path: str | Path) -> bool:
    """Returns whether `path` looks like a Hugging Face folder: by its config.json, damaged or not, or its weights."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        return False
    text = (folder / CONFIG).read_bytes()
    if b'"model_type"' in text:
        return True
    weights = any((folder / name).is_file() for name in (TENSORS, INDEX))
    return weights and not (folder / "checkpoints").is_dir()


def read_config(folder: Path) -> dict[str, Any]:
    """Returns config.json as plain values."""
    return read_json(folder / CONFIG)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns every tensor of a folder by name: of `model.safetensors`, or of all the shards that an index names.

    Raises InputError for pickled weights, a missing or damaged file, and an index that does not fit its shards.
    """
    if (folder / TENSORS).is_file():
        return _read_file(folder / TENSORS)
    if not (folder / INDEX).is_file():
        raise InputError(_why_no_tensors(folder))
    tensors: dict[str, np.ndarray] = {}
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{folder / INDEX} has no weight_map of tensors to files: copy the folder again")
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise InputError(f"{folder / INDEX} names {name!r}, expected the name of a file beside it")
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}, which {INDEX} names: copy the folder again, with all its shards")
        tensors |= {tensor: array for tensor, array in _read_file(folder / name).items() if places.get(tensor) == name}
    lost = sorted(set(places) - set(tensors))
    if lost:
        raise InputError(f"{folder / INDEX} promises {lost[0]} in {places[lost[0]]}, which has no such tensor")
    return tensors


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> None:
    """Writes a folder's files, the weights in one safetensors file; `texts` are further files by name."""
    from safetensors.numpy import save_file

    # transformers asks for this mark of which framework's layout the tensors have.
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, str(folder / TENSORS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    for name, text in texts.items():
        (folder / name).write_text(text)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}, of a Hugging Face folder, cannot be read as JSON ({error}): copy the folder again"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"{path}, of a Hugging Face folder, holds a {type(values).__name__}, expected a JSON object")
    return values


def _read_file(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}): copy it again") from error
    except (AttributeError, KeyError, TypeError) as error:  # a dtype that NumPy does not have
        raise InputError(f"{path} has a tensor of a dtype that cannot be read ({error}); {FLOATS_ONLY}") from error
    for name, tensor in tensors.items():
        if tensor.dtype.name not in FLOATS and not name.endswith(BUFFERS):
            raise InputError(f"{name} in {path} is {tensor.dtype.name}; {FLOATS_ONLY}")
    return tensors


def _why_no_tensors(folder: Path) -> str:
    pickled = sorted(file.name for file in folder.iterdir() if file.name.endswith(PICKLED))
    if pickled:
        return (
            f"{folder} has its weights in {pickled[0]}, a pickle, which can run code when it is read, so it is "
            "refused; where you trust it, load it with transformers and save_pretrained(DIR, safe_serialization=True), "
            "then give DIR"
        )
    return f"{folder} has no {TENSORS} and no {INDEX}: expected the weights as safetensors"

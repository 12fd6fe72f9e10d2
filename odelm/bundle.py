"""A bundle: a model in a folder of its own, for inference without the run that it is from.

    model.safetensors   every parameter under its own name, as it is or in 8 bits (`odelm.int8_storage`)
    config.json         the config, as that of a run
    tokenizer.json      if the model has a tokenizer
    bundle.json         the sizes of these files, how many updates the model had, and what each artifact is
    manifest.sha256     the checksums of all of them
    profile.json        if what the bundle was made from has one; it has a checksum of its own, and may be made anew

Artifacts, such as those of `odelm.infer.export`, are further files. A bundle is written whole or not at all, and every
byte is checked before it is used. Nothing in it is executed or unpickled. Other files, such as a report in `infer/`,
are not looked at.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from odelm import int8_storage, manifest, sharding
from odelm import profile as profiles
from odelm import tokenizer as tokenizers
from odelm.config import Config, ModelConfig, from_json, to_json
from odelm.errors import InputError
from odelm.files import publish
from odelm.models import CausalLM, Classifier, MaskedLM, create
from odelm.models.parameters import name_of, parameters
from odelm.profile import PROFILE
from odelm.run_directory import CONFIG, TOKENIZER
from odelm.version import __version__

ABOUT, PARAMETERS = "bundle.json", "model.safetensors"
FORMAT, FORMATS = 1, (1, 2)
"""The format of `bundle.json`, and the formats that can be read: 2 has parameters of 8 bits."""
STORAGES = ("full", "int8")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtypes that parameters may have, by their names in safetensors."""

About = dict[str, Any]
"""What `bundle.json` says: `format`, `odelm` (a version), `step`, `files` (bytes), `profile` (if any), `artifacts`."""
Artifact = tuple[str, bytes, dict[str, Any]]
"""The name of a file, its bytes, and what `bundle.json` says of it."""


def is_bundle(path: str | Path) -> bool:
    """Returns whether a folder is a bundle, whole or damaged."""
    folder = Path(path)
    if (folder / ABOUT).is_file():
        return True
    return manifest.is_sealed(folder) and any((folder / name).is_file() for name in (CONFIG, PARAMETERS))


def check_new(folder: str | Path) -> Path:
    """Returns the folder as a path; InputError if it exists already."""
    folder = Path(folder).expanduser()
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists already; give a new directory")
    return folder


def check_model(model: nnx.Module) -> None:
    """Raises InputError for a model that a bundle cannot hold: an encoder without a head, or one that is quantised."""
    if not isinstance(model, CausalLM | MaskedLM | Classifier):
        raise InputError(
            f"the model is a {type(model).__name__}, but a bundle holds a language model or a classifier: give one "
            "that has its head"
        )
    if model.quantization is not None:
        raise InputError(
            f"the model is quantised, as {model.quantization}, but a bundle holds the parameters of training: write "
            "the one that it was made from, and quantise what is loaded"
        )


def write(
    folder: str | Path,
    model: CausalLM | MaskedLM | Classifier,
    config: Config,
    *,
    tokenizer: Tokenizer | None = None,
    step: int | None = None,
    profile: Path | None = None,
    artifacts: Iterable[Artifact] = (),
    storage: str = "full",
) -> About:
    """Writes a bundle, whole or not at all, and returns what its `bundle.json` says.

    Args:
        model: its parameters are written in their dtypes, and its config replaces `config.model`.
        step: how many updates it had; None if that is unknown.
        profile: a file of what becomes `profile.json`, unless the stored parameters differ from the model's own,
            where int8 rounds them.
        artifacts: taken one at a time, so that they need not be in memory together.
        storage: "full" writes the parameters as they are, "int8" large ones in 8 bits (`odelm.int8_storage`), which
            become float32 again when they are loaded.

    Raises InputError if the folder exists, if it cannot be written, for a model without a head or one that is
    quantised, for a profile that is damaged or of another model, and for a config that is invalid with the model's.
    """
    folder = check_new(folder)
    check_model(model)
    if storage not in STORAGES:
        raise InputError(f"storage is {storage!r}, expected one of {', '.join(STORAGES)}")
    config = dataclasses.replace(config, model=model.config).validate(saved=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in parameters(model).items()}
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    _check_parameters("the model", found, _abstract(model.config))
    stored = int8_storage.pack(arrays) if storage == "int8" else arrays
    if profile is not None and (profiles.read_for(model, profile) is None or not _loads_as(stored, arrays)):
        profile = None
    try:
        with publish(folder, option="folder") as partial:
            _write_files(partial, stored, config, tokenizer, profile)
            about = _finish(partial, step, artifacts, FORMAT if stored is arrays else 2)
            seal = (partial / manifest.MANIFEST).read_bytes()
        if not manifest.is_sealed(folder) or (folder / manifest.MANIFEST).read_bytes() != seal:
            raise InputError(f"{folder} exists already: another process has just written it; give a new directory")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written ({error}); make room, or give another directory") from error
    return about


def _loads_as(stored: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> bool:
    if stored is arrays:
        return True
    for name, array in arrays.items():
        scales = stored.get(name + int8_storage.SCALES)
        if not np.array_equal(stored[name] if scales is None else int8_storage.unpacked(stored[name], scales), array):
            return False
    return True


def _write_files(
    folder: Path, arrays: dict[str, np.ndarray], config: Config, tokenizer: Tokenizer | None, profile: Path | None
) -> None:
    save_file(arrays, str(folder / PARAMETERS))
    (folder / CONFIG).write_text(to_json(config))
    # safetensors lets only the owner read its file.
    shutil.copymode(folder / CONFIG, folder / PARAMETERS)
    if tokenizer is not None:
        (folder / TOKENIZER).write_text(tokenizer.to_str())
    if profile is not None:
        profiles.write(profiles.read(profile), folder / PROFILE)


def load(
    path: str | Path, *, adjust: Callable[[Config], Config] | None = None, mesh: Mesh | None = None
) -> tuple[CausalLM | MaskedLM | Classifier, Config, Tokenizer | None]:
    """Returns (model, config, tokenizer) of a bundle, after every byte of it has been checked.

    `adjust` may change the config before the model is made. The parameters go to the first device, or are cut over the
    axes `fsdp` and `tensor` of a mesh of Auto axes. Raises InputError that names the file which is missing, damaged or
    does not fit.
    """
    path = Path(path).expanduser()
    files = read_about(path)["files"]
    config = _config(path / CONFIG)
    config = adjust(config).validate(saved=True) if adjust else config
    model = _read_parameters(path / PARAMETERS, _abstract(config.model), mesh)
    return model, config, tokenizers.load(path / TOKENIZER) if TOKENIZER in files else None


def updates(path: str | Path) -> int | None:
    """Returns how many updates the model of a bundle had, None if that is unknown. The files are not checked: `load`
    does that."""
    return _parsed(Path(path).expanduser() / ABOUT).get("step")


def read_about(path: str | Path) -> About:
    """Returns what `bundle.json` says, after every byte of the bundle has been checked.

    Raises InputError that names the first file which is missing or damaged, and for a bundle of another format.
    """
    path = Path(path).expanduser()
    try:
        if not manifest.is_sealed(path):
            raise manifest.Damaged(f"{manifest.MANIFEST} is missing")
        manifest.check(path, only={ABOUT})
        about = _parsed(path / ABOUT)
        if PROFILE in about["files"] and profiles.has_checksum(path / PROFILE):
            del about["files"][PROFILE]  # in a bundle of an older version, and made anew
        if about.get("profile") and not (path / PROFILE).is_file():
            raise manifest.Damaged(f"{PROFILE} is missing")
        # A copy that was cut short is found before gigabytes of checksums are computed.
        for name, size in about["files"].items():
            if (path / name).is_file() and (path / name).stat().st_size != size:
                raise manifest.Damaged(f"{name} has {(path / name).stat().st_size:,} bytes in place of {size:,}")
        manifest.check(path, only=about["files"])
    except (manifest.Damaged, OSError) as damage:
        raise InputError(
            f"{path} is not the bundle that its {manifest.MANIFEST} describes: {damage}; copy it again"
        ) from damage
    return about


def _parsed(file: Path) -> About:
    try:
        about = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}); copy the bundle again") from error
    number = about.get("format") if isinstance(about, dict) else None
    if number not in FORMATS or not isinstance(about.get("files"), dict):
        raise InputError(f"{file} has format {number!r}, but this odelm reads {FORMATS[0]} and {FORMATS[1]}: update it")
    return about


def _config(file: Path) -> Config:
    try:
        return from_json(file.read_bytes().decode())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: {error}") from error


def _finish(folder: Path, step: int | None, artifacts: Iterable[Artifact], format: int) -> About:
    """Writes the artifacts, `bundle.json` and the manifest of a folder that has everything else."""
    described = {}
    for name, data, description in artifacts:
        (folder / name).write_bytes(data)
        described[name] = description
    about = {
        "format": format,
        "odelm": __version__,
        "step": step,
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != PROFILE},
        "profile": (folder / PROFILE).is_file(),
        "artifacts": described,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    manifest.write(folder, but={PROFILE})
    return about


def _abstract(config: ModelConfig) -> CausalLM | MaskedLM | Classifier:
    return nnx.eval_shape(lambda: create(config, rngs=nnx.Rngs(0)))


def _read_parameters(
    file: Path, abstract: CausalLM | MaskedLM | Classifier, mesh: Mesh | None
) -> CausalLM | MaskedLM | Classifier:
    """Returns the model with the parameters of a file, read one after the other onto the devices of the mesh."""
    graph, shapes = nnx.split(abstract, nnx.Param)
    try:
        with safe_open(str(file), framework="numpy") as tensors:
            found = _described(tensors, str(file))
            _check_parameters(str(file), found, abstract)
            names = set(tensors.keys())

            def placed(path: tuple[Any, ...], leaf: Any, layout: Sharding) -> jax.Array:
                array, scales = tensors.get_tensor(name_of(path)), name_of(path) + int8_storage.SCALES
                if scales in names:
                    array = int8_storage.unpacked(array, tensors.get_tensor(scales))
                return jax.make_array_from_callback(leaf.shape, layout, lambda index: array[index])

            params = jax.tree_util.tree_map_with_path(placed, shapes, sharding.placements(shapes, mesh))
    except SafetensorError as error:
        raise InputError(f"{file} is not a whole safetensors file ({error}); copy the bundle again") from error
    return nnx.merge(graph, params)


def _described(tensors: Any, place: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns the dtype and shape of each parameter of an open file; those of 8 bits become float32.

    Raises InputError for parameters of 8 bits whose scales are missing, too many or too few.
    """
    slices = {name: tensors.get_slice(name) for name in tensors.keys()}
    kinds = {name: (str(one.get_dtype()), tuple(one.get_shape())) for name, one in slices.items()}
    described = {name: (DTYPES.get(kind, kind), shape) for name, (kind, shape) in kinds.items()}
    for name, (kind, shape) in kinds.items():
        if kind == "I8":
            expected = ("float32", (int8_storage.scale_count(math.prod(shape)),))
            scales = described.pop(name + int8_storage.SCALES, ("absent", ()))
            if scales != expected:
                raise InputError(f"the scales of {name} of {place} are {scales}, expected {expected}")
            described[name] = ("float32", shape)
    return described


def _check_parameters(place: str, found: Mapping[str, tuple[str, tuple[int, ...]]], abstract: nnx.Module) -> None:
    """Raises InputError for the first parameter whose shape is not the model's, or whose dtype is not a known one.

    `found` has the dtype and shape of each by its name.
    """
    expected = {name: leaf.shape for name, leaf in parameters(abstract).items()}
    for name in sorted(expected.keys() | found.keys()):
        dtype, shape = found.get(name, ("", "absent"))
        if shape != expected.get(name, "absent"):
            raise InputError(f"{name} of {place} is {shape}, but {CONFIG} gives {expected.get(name, 'absent')}")
        if dtype not in DTYPES.values():
            raise InputError(f"{name} of {place} is {dtype}, expected one of {', '.join(DTYPES.values())}")

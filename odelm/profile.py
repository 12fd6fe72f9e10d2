"""How to cross the depth of one model cheaply: the choice of `infer.py --max_loss_increase`, kept in `profile.json`.

A profile is a promise about the loss of the model that it was made for. It has the fingerprint of that model, so that
it is not used with another one.
"""

import dataclasses
import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from odelm import ode
from odelm.arguments import shown
from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.files import fingerprint, write_text
from odelm.models.parameters import parameters
from odelm.models.transformer import SharedTransformer

PROFILE = "profile.json"
"""Its name in a run directory, or in a Hugging Face folder."""
VERSION = 1
NOT_OF_THE_SHAPE = ("dtype", "residual_dtype", "attention", "dropout")
"""Options of a model that change neither its parameters nor, except for rounding, its results."""
AGAIN = "make it again by `infer.py --max_loss_increase=0.5%`, or remove the file"


@dataclass(frozen=True)
class Profile:
    """A way to cross the core of a model, and what is known of its cost in loss."""

    grid: tuple[float, ...]
    """Increasing times from 0 to the length of the core, (N + 1,)."""
    solver: str
    """A name in `odelm.ode.SOLVERS`."""
    evaluations: int
    """How often a forward pass applies a block, prelude and coda included."""
    max_loss_increase: float
    """The increase of the loss that was allowed, relative to full depth: 0.005 is half a per cent."""
    loss_increase: float
    """The increase on text that the search did not see, in the same unit; below 0 if the loss is lower."""
    loss_increase_bound: float
    """An upper bound on the increase, at a one-sided confidence of 95 %."""
    text: str
    """Where that text is from."""
    tokens: int
    """How many of its tokens were predicted."""
    documents: int
    """How many of the text's documents the bound was computed over: it holds for other documents like them. 0 means
    that it was computed over rows, because documents could not be kept apart from those that were searched: it then
    holds for other rows of the same documents."""
    fingerprint: str
    """Of the model, by `fingerprint_of`."""

    @property
    def steps(self) -> int:
        return len(self.grid) - 1


def write(profile: Profile, path: Path) -> None:
    """Writes a profile, whole or not at all; raises InputError where it cannot be written."""
    found = {"version": VERSION} | dataclasses.asdict(profile)
    text = json.dumps(found | {"checksum": fingerprint(found)}, indent=2, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); give --out") from error


def read(path: Path) -> Profile:
    """Returns the profile in a file; raises InputError for one that is damaged or was changed, or of another version.

    A file without a checksum, such as one of an earlier version of odelm, is read as it is.
    """
    try:
        found = dict(json.loads(path.read_text()))
        checksum = found.pop("checksum", None)
        changed = checksum is not None and checksum != fingerprint(found)
        version = found.pop("version")
        if version == VERSION and changed:
            raise ValueError("its checksum is that of other values")
        if version == VERSION:
            found["grid"] = tuple(map(float, found["grid"]))
            return _checked(Profile(**found))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); {AGAIN}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged, or no profile ({error!r}); {AGAIN}") from error
    raise InputError(f"{path} is a profile of version {version!r}, expected {VERSION}; {AGAIN}")


def has_checksum(path: Path) -> bool:
    """Whether a file is a profile that has a checksum."""
    try:
        return "checksum" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def found_for(model: SharedTransformer, path: str | Path) -> Profile:
    """Returns the profile in a file; raises InputError where there is none, or if it is of another model."""
    if not isinstance(path, str | os.PathLike) or path == "":
        raise InputError(f"profile is {shown(path)}, expected the path of a file")
    profile = read_for(model, Path(path).expanduser())
    if profile is None:
        raise InputError(f"{path} is no file, expected a profile of `infer.py --max_loss_increase`")
    return profile


def read_for(model: SharedTransformer, path: Path) -> Profile | None:
    """Returns the profile in a file, None if there is no such file; raises InputError if it is of another model."""
    if not path.is_file():
        return None
    profile = read(path)
    own = fingerprint_of(model)
    if profile.fingerprint != own:
        raise InputError(
            f"{path} is of another model, or of other parameters of this one: it has the fingerprint "
            f"{profile.fingerprint}, and the model has {own}; {AGAIN}"
        )
    try:
        ode.grid.checked(profile.grid, model.config.core, model.config.groups)
    except InputError as error:
        raise InputError(f"{path} is damaged ({error}); {AGAIN}") from error
    return profile


def fingerprint_of(model: SharedTransformer) -> str:
    """Returns 16 hex digits that are equal for models of the same shape with the same float32 parameters."""
    shape = {name: value for name, value in _shape(model.config).items() if name not in NOT_OF_THE_SHAPE}
    named = sorted(parameters(model).items())
    # Hashing releases the interpreter's lock, so that the parameters of a large model are hashed side by side.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(_digest, [array for _, array in named]))
    return fingerprint(shape, [[name, *digest] for (name, _), digest in zip(named, digests, strict=True)])


def _shape(config: ModelConfig) -> dict[str, Any]:
    """Returns the options that are not the default ones: an option that is added later changes no fingerprint."""
    own, usual = dataclasses.asdict(config), dataclasses.asdict(ModelConfig())
    return {name: value for name, value in own.items() if value != usual[name]}


def _digest(array: Any) -> tuple[list[int], str]:
    values = np.ascontiguousarray(array, np.float32)
    return list(values.shape), hashlib.sha256(values.data).hexdigest()


def _checked(profile: Profile) -> Profile:
    """Returns the profile, or raises ValueError or TypeError for values that no profile has."""
    ode.grid.increasing(profile.grid)
    ode.get_tableau(ode.get_solver(profile.solver))
    numbers = (profile.max_loss_increase, profile.loss_increase, profile.loss_increase_bound)
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"its increases are {numbers}, expected finite numbers")
    if profile.evaluations < 1 or profile.tokens < 1:
        raise ValueError(f"its evaluations are {profile.evaluations} and its tokens {profile.tokens}")
    return profile

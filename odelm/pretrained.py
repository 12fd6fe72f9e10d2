"""Loads a model: from a run directory, a bundle or a Hugging Face folder, or one that comes with odelm by its name."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from odelm import bundle, checkpoint, interop, remote, shipped
from odelm import profile as profiles
from odelm.config import Config
from odelm.errors import InputError
from odelm.files import is_url
from odelm.interop.family import Model

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from tokenizers import Tokenizer


def load(
    path: str | Path,
    *,
    step: int | None = None,
    adjust: Callable[[Config], Config] | None = None,
    mesh: "Mesh | None" = None,
    with_profile: bool = True,
    profile: str | Path | None = None,
) -> tuple[Model, Config, "Tokenizer | None"]:
    """Returns (model, config, tokenizer) of a run directory, of a bundle (`odelm.bundle`), of a Hugging Face folder, or
    of a model that comes with odelm, by its name, such as "small-decoder" (`odelm.shipped`).

    A run directory may be a URL (`odelm.remote`). A `profile.json` in it becomes `model.profile` (`odelm.profile`).

    Args:
        step: for a run, which checkpoint; None is the newest.
        adjust: changes the config before the model is made; of a Hugging Face folder only dtypes, `attention` and
            `kv_span`.
        mesh: a mesh of Auto axes whose `fsdp` and `tensor` cut the parameters of a run or bundle; None is one device.
        with_profile: whether a profile is read.
        profile: a profile of this model that is elsewhere, in place of the one beside it.

    The tokenizer is None where there is no `tokenizer.json`. Raises InputError, naming what is missing or does not
    fit, for what is none of these, and for a profile that is damaged or of other parameters.
    """
    if is_url(path):
        path = remote.fetched(str(path), checkpoint.to_stderr)
    path = shipped.found(path)
    if not path.is_dir():
        raise InputError(shipped.not_found(path))
    model, config, tokenizer = _loaded(path, step, adjust, mesh)
    if profile is not None:
        model.profile = profiles.found_for(model, profile)
    elif with_profile:
        model.profile = profiles.read_for(model, path / profiles.PROFILE)
    return model, config, tokenizer


def _loaded(
    path: Path, step: int | None, adjust: Callable[[Config], Config] | None, mesh: "Mesh | None"
) -> tuple[Model, Config, "Tokenizer | None"]:
    if bundle.is_bundle(path):
        if step is not None:
            raise InputError(f"step={step} was given, but {path} is a bundle, which has no checkpoints")
        return bundle.load(path, adjust=adjust, mesh=mesh)
    if not interop.is_folder(path):
        return checkpoint.load(path, step=step, adjust=adjust, mesh=mesh)
    if mesh is not None:
        raise InputError(f"{path} is a Hugging Face folder, which is loaded on one device: start a run from it first")
    if step is not None:
        raise InputError(f"step={step} was given, but {path} is a Hugging Face folder, which has no checkpoints")
    options = adjust(Config()).model if adjust else None
    return interop.load(path, options=options)

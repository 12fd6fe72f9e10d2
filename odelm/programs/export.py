"""What `infer.py --export` does: a bundle of a model, with its forward pass at chosen step counts."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from absl.flags import FlagValues

from odelm.config import Config
from odelm.errors import InputError

OTHERS = dict(
    prompt=None,
    prompt_file=None,
    generate=False,
    baseline=None,
    text=None,
    quantize=None,
    adaptive_tolerance=None,
    early_exit=None,
    kv_span=None,
    window=None,
    tensor=1,
)
"""Flags that do not go with --export, and what they are unset."""


def target(flags: FlagValues) -> Path | None:
    """Returns the bundle to write, None for another mode; InputError for one that exists, and for flags that do not go
    with it."""
    if flags.export is None:
        if flags["storage"].present:
            raise InputError("--storage is of --export, which was not given")
        return None
    from odelm import bundle

    for name, unset in OTHERS.items():
        if flags[name].value != unset:
            raise InputError(f"--export and --{name} were given, which do not go together: leave out one of them")
    return bundle.check_new(flags.export)


def export(
    loaded: tuple[Any, Config, Any],
    folder: Path,
    steps: tuple[int, ...],
    flags: FlagValues,
    *,
    source: Path,
    step: int | None,
) -> None:
    """Writes a bundle of what `odelm.load` returned from `source`, and prints a line with the bytes of each file.

    `step` is how many updates the model had, if that is known. Raises InputError as `odelm.bundle.write` and
    `odelm.infer.export.forward_artifacts` do.
    """
    from odelm import bundle
    from odelm.infer.export import forward_artifacts
    from odelm.profile import PROFILE

    model, config, tokenizer = loaded
    bundle.check_model(model)
    artifacts = forward_artifacts(
        model, steps=steps, solver=flags.solver, integrator=flags.integrator, dtype=flags.dtype
    )
    profile = _profile_of(model, source, flags.profile_file)
    if profile is not None and flags.steps is None:
        artifacts = chain(artifacts, _as_profile_says(model, profile, steps, flags))
    about = bundle.write(
        folder, model, config, tokenizer=tokenizer, step=step, profile=profile, artifacts=artifacts,
        storage=flags.storage,
    )  # fmt: skip
    print(f"wrote {folder}")
    if profile is not None and not (folder / PROFILE).is_file():
        print(f"without {PROFILE}, which is of the parameters before they were rounded: search again in the bundle")
    for file in sorted(folder.iterdir()):
        artifact = about["artifacts"].get(file.name)
        print(f"{file.stat().st_size:>14,}  {file.name}" + ("" if artifact is None else f"  {described(artifact)}"))


def _profile_of(model: Any, source: Path, given: str | None) -> Path | None:
    """Returns the file of the model's profile, if it has one."""
    from odelm import profile as profiles

    if given is None:
        path = source / profiles.PROFILE
        return path if path.is_file() else None
    profiles.found_for(model, given)
    return Path(given).expanduser()


def _as_profile_says(model: Any, path: Path, steps: tuple[int, ...], flags: FlagValues) -> Iterator[Any]:
    """Returns the forward pass that a profile describes, unless it is one of those in equal steps."""
    from odelm import profile as profiles
    from odelm.infer.export import forward_artifacts
    from odelm.ode.grid import equal

    profile = profiles.found_for(model, path)
    grids = [tuple(equal(model.config.core, count).tolist()) for count in steps]
    if profile.solver == flags.solver and profile.grid in grids:
        return iter(())
    return forward_artifacts(model, grids=[profile.grid], solver=profile.solver, dtype=flags.dtype)


def described(artifact: dict[str, Any]) -> str:
    """Returns what the forward pass of a bundle is, from what its `bundle.json` says."""
    return (
        f"{artifact['evaluations']} evaluations of the blocks, {artifact['dtype']}, for "
        f"{', '.join(artifact['platforms'])}"
    )

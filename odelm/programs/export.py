"""What `infer.py --export` does: a bundle of a model, with its forward pass at chosen step counts."""

from pathlib import Path
from typing import Any

from odelm import bundle
from odelm.config import Config
from odelm.infer.export import forward_artifacts
from odelm.profile import PROFILE


def export(
    loaded: tuple[Any, Config, Any],
    folder: Path,
    steps: tuple[int, ...],
    *,
    source: Path,
    step: int | None,
    solver: str = "euler",
    integrator: str = "scan",
    dtype: str = "auto",
) -> None:
    """Writes a bundle of what `odelm.load` returned from `source`, and prints a line with the bytes of each file.

    `step` is how many updates the model had, if that is known. Raises InputError as `odelm.bundle.write` and
    `odelm.infer.export.forward_artifacts` do.
    """
    model, config, tokenizer = loaded
    bundle.check_model(model)
    artifacts = forward_artifacts(model, steps=steps, solver=solver, integrator=integrator, dtype=dtype)
    profile = source / PROFILE
    about = bundle.write(
        folder, model, config, tokenizer=tokenizer, step=step, profile=profile if profile.is_file() else None,
        artifacts=artifacts,
    )  # fmt: skip
    print(f"wrote {folder}")
    for file in sorted(folder.iterdir()):
        artifact = about["artifacts"].get(file.name)
        print(f"{file.stat().st_size:>14,}  {file.name}" + ("" if artifact is None else f"  {described(artifact)}"))


def described(artifact: dict[str, Any]) -> str:
    """Returns what the forward pass of a bundle is, from what its `bundle.json` says."""
    return (
        f"{artifact['evaluations']} evaluations of the blocks, {artifact['dtype']}, for "
        f"{', '.join(artifact['platforms'])}"
    )

"""Small trained models that come with odelm, found by name: `odelm.load("small-decoder")`.

Each is a bundle (`odelm.bundle`) in a folder of this package, with `README.md`, which says what it was trained on and
what it reached, and `held_out.jsonl`, text that it was not trained on.
"""

import os
from pathlib import Path
from typing import Any

from odelm.errors import InputError

FOLDER = Path(__file__).parent
HELD_OUT = "held_out.jsonl"


def names() -> list[str]:
    """Returns the names of the models."""
    return sorted(path.name for path in FOLDER.iterdir() if (path / "config.json").is_file())


def found(path: str | Path) -> Path:
    """Returns the folder of the model that a name stands for; what is no name, or is a folder too, as a path.

    Raises InputError for what cannot be a path.
    """
    if not isinstance(path, str | os.PathLike) or path == "":
        raise InputError(not_found(path))
    given = Path(path).expanduser()
    return FOLDER / str(path) if not given.exists() and str(path) in names() else given


def not_found(path: Any) -> str:
    """Returns what an error says of a path that is neither a directory nor the name of a model."""
    return (
        f"{path or repr(path)} is not a directory; give a training run, a bundle, a Hugging Face folder or one of the "
        f"models that come with odelm, {', '.join(names())}"
    )


def name_of(path: Path) -> str | None:
    """Returns which of the models is in a folder, None for another folder."""
    return path.name if path.parent == FOLDER and path.name in names() else None


def held_out(path: Path) -> str | None:
    """Returns the file of text that the shipped model in a folder was not trained on; None for another folder."""
    return None if name_of(path) is None else str(path / HELD_OUT)


def reports(path: Path) -> Path | None:
    """Returns where reports of a shipped model go, `runs/shipped/NAME`; None for another folder."""
    name = name_of(path)
    return None if name is None else Path("runs", "shipped", name)

"""The checkpoints of a run as files: which are finished, their metadata, whether they are whole, and which are kept.

A checkpoint, `checkpoints/<step>/` in the run directory, is finished once it has a manifest of the checksums of all its
files (`odelm.manifest`), which is written last.
"""

import datetime
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from odelm import manifest
from odelm.config import TrainConfig
from odelm.errors import InputError
from odelm.retention import Saved, superseded
from odelm.run_directory import CHECKPOINTS, DAMAGED

Meta = dict[str, Any]
"""The metadata of a checkpoint beside its arrays, as JSON: at least its `step`."""
HeldOutLosses = Mapping[int, Mapping[int, float]]
"""Held-out losses by step and by number of depth steps, full depth first."""
SEALED = "sealed"
"""In `meta`: the checkpoint is one that gets a manifest. Those of version 0.1 have none, and are not checked."""
REMOVED = ".removed"
"""The suffix of the name of a checkpoint that is being removed."""
Result = TypeVar("Result")


class CheckpointFiles:
    """The folder of a run's checkpoints, which may not exist yet."""

    def __init__(self, workdir: str | Path):
        self.workdir = Path(workdir)
        self.root = (self.workdir / CHECKPOINTS).absolute()

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, ascending; damaged ones are among them until they are read."""
        return [step for step in self._all_steps() if not self._is_unfinished(step)]

    def directory(self, step: int) -> Path:
        """Returns the folder of a checkpoint."""
        return self.root / str(step)

    def meta(self, step: int) -> Meta:
        """Returns the metadata of a checkpoint, {} if it cannot be read."""
        try:
            found = json.loads((self.directory(step) / "meta" / "metadata").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def seal(self, step: int) -> None:
        """Writes the manifest of a checkpoint, which makes it finished."""
        manifest.write(self.directory(step))

    def check(self, step: int) -> None:
        """Reads every byte of a checkpoint; raises `manifest.Damaged` if one is not as it was written."""
        if manifest.is_sealed(self.directory(step)):
            manifest.check(self.directory(step))

    def first_whole(
        self, read: Callable[[int], Result], announce: Callable[[str], None]
    ) -> tuple[int, Result, list[int]] | None:
        """Returns the newest step that `read` does not find damaged, what it returns, and the damaged steps above that.

        The damaged steps are announced. None if there is no step; raises InputError if all are damaged.
        """
        damaged: list[tuple[int, manifest.Damaged]] = []
        for step in reversed(self.steps()):
            try:
                found = read(step)
            except manifest.Damaged as damage:
                damaged.append((step, damage))
                continue
            for newer, damage in damaged:
                announce(f"checkpoint {newer} of {self.workdir} is damaged, {damage}: takes step {step}")
            return step, found, [newer for newer, _ in damaged]
        if damaged:
            newest, damage = damaged[0]
            others = " and the others are damaged too;" if len(damaged) > 1 else ""
            raise InputError(
                f"checkpoint {newest} of {self.workdir} cannot be read: {damage};{others} restore it, or train "
                "again in another --workdir"
            )
        return None

    def set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints to `damaged/` in the run directory: a run that resumes will save these steps again."""
        for step in steps:
            to = self.workdir / DAMAGED / str(step)
            shutil.rmtree(to, ignore_errors=True)
            to.parent.mkdir(exist_ok=True)
            self.directory(step).rename(to)

    def clean(self) -> None:
        """Sets aside what an interrupted save has left, and removes what an interrupted removal has left."""
        self.set_aside([step for step in self._all_steps() if self._is_unfinished(step)])
        for left in self.root.glob(f"*{REMOVED}"):
            shutil.rmtree(left, ignore_errors=True)

    def remove_superseded(self, retention: TrainConfig, evaluated: Callable[[], HeldOutLosses]) -> None:
        """Removes the checkpoints that need not stay; `evaluated` gives the losses that are not in a checkpoint's
        metadata."""
        known = evaluated() if retention.keep_best else {}
        for step in superseded([self._saved(step, known) for step in self.steps()], retention):
            # The remains of an interrupted removal are not a step.
            removed = self.directory(step).rename(self.root / f"{step}{REMOVED}")
            shutil.rmtree(removed, ignore_errors=True)

    def _all_steps(self) -> list[int]:
        names = (path.name for path in self.root.iterdir()) if self.root.is_dir() else ()
        return sorted(int(name) for name in names if name.isdecimal())

    def _is_unfinished(self, step: int) -> bool:
        """Returns whether a checkpoint lacks the manifest that it was to have: its save was interrupted."""
        return not manifest.is_sealed(self.directory(step)) and SEALED in self.meta(step)

    def _saved(self, step: int, known: HeldOutLosses) -> Saved:
        losses: Mapping[Any, float] = self.meta(step).get("eval_loss") or known.get(step, {})
        when = datetime.datetime.fromtimestamp(self.directory(step).stat().st_mtime, datetime.UTC)
        return Saved(step, when, {"loss": next(iter(losses.values()))} if losses else None)


def latest_step(workdir: str | Path) -> int:
    """Returns the number of updates of the newest finished checkpoint, or raises InputError."""
    files = CheckpointFiles(workdir)
    if not files.root.is_dir():
        raise InputError(f"{workdir} has no {CHECKPOINTS}: the run saved nothing yet; train for longer")
    steps = files.steps()
    if not steps:
        raise InputError(f"{workdir} has no finished checkpoint; train for longer, or resume the run")
    return steps[-1]


def newest_whole(workdir: str | Path) -> int:
    """Returns the step of the newest checkpoint whose every byte is right; damaged ones are reported on stderr.

    Raises InputError if there is none.
    """
    latest_step(workdir)
    files = CheckpointFiles(workdir)
    found = files.first_whole(files.check, to_stderr)
    assert found is not None, "latest_step has found one"
    return found[0]


def to_stderr(text: str) -> None:
    """Prints a line to stderr."""
    print(text, file=sys.stderr)

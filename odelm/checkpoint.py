"""The checkpoints of a run, saved and restored with Orbax, for training and inference alike.

A checkpoint, `checkpoints/<step>/` in the run directory, has the items `params`, `optimizer` and `meta`, and a manifest
of the checksums of all files (`odelm.manifest`). "Step k" means that k updates were made; the data position and the
random draws are functions of it. A checkpoint counts once it has its manifest. Every byte of one is checked before it
is restored, and one that is damaged is passed over for the one before it.
"""

import datetime
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from tokenizers import Tokenizer

from odelm import manifest, sharding
from odelm import tokenizer as tokenizers
from odelm.config import Config, TrainConfig
from odelm.errors import InputError, RunFailure
from odelm.models import CausalLM, MaskedLM, create
from odelm.models.parameters import name_of
from odelm.retention import Saved, superseded
from odelm.run_directory import CHECKPOINTS, CONFIG, DAMAGED, TOKENIZER, read_config

Meta = dict[str, Any]
"""What a checkpoint says beside arrays, as JSON: at least its `step`."""
SEALED = "sealed"
"""In `meta`: the checkpoint is one that gets a manifest. Those of version 0.1 have none, and are not checked."""
AVERAGE = "average"
"""The item of a checkpoint that has the mean of the parameters."""
REMOVED = ".removed"
"""What the name of a checkpoint that is being removed ends in."""
FILE_ERRORS = ("No space left", "ENOSPC", "Disk quota", "Permission denied", "Read-only file system")
"""What TensorStore says of a file system that takes nothing more; its errors have no type of their own."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint as it was saved."""

    step: int
    params: Any
    optimizer: Any
    meta: Meta
    average: Any = None


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous; a step exists once it is complete."""

    def __init__(
        self,
        workdir: str | Path,
        *,
        retention: TrainConfig | None = None,
        read_only: bool = False,
        announce: Callable[[str], None] | None = None,
    ):
        """`retention` says which checkpoints stay, None that all do; `announce` is told of damaged ones."""
        # A reader does not touch unfinished checkpoints: a run that is in progress may be writing them.
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=not read_only, read_only=read_only, create=not read_only
        )
        self._workdir, self._read_only = Path(workdir), read_only
        self._retention = retention
        self._announce = announce or (lambda text: print(text, file=sys.stderr))
        self._root = (self._workdir / CHECKPOINTS).absolute()
        if not read_only and jax.process_index() == 0:
            for left in self._root.glob(f"*{REMOVED}"):
                shutil.rmtree(left, ignore_errors=True)
        self._manager = ocp.CheckpointManager(self._root, options=options)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, ascending; damaged ones are among them until they are read."""
        return [step for step in self._all_steps() if not self._is_unfinished(step)]

    def latest(self) -> int | None:
        """Returns the newest finished step, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, step: int, params: Any, optimizer: Any, meta: Meta | None = None, *, average: Any = None) -> None:
        """Saves in the background; `step` is the number of updates made. A step already there stays as it is.

        `average` is the mean of the parameters that is to be loaded in their place, None if there is none.

        Raises RunFailure if this save, or the one before it, cannot be written.
        """
        self.wait()
        if step in self.steps():
            return
        if (self._root / str(step)).exists():
            self._set_aside(step)
        newest = max(self._all_steps(), default=-1)
        if step < newest:
            raise RuntimeError(f"step {step} was not saved: the newest checkpoint is already {newest}")
        items = {"params": params, "optimizer": optimizer} | ({} if average is None else {AVERAGE: average})
        arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        said = ocp.args.JsonSave({"step": step, SEALED: 1} | (meta or {}))
        try:
            self._manager.save(step, args=ocp.args.Composite(**arrays, meta=said))
        except Exception as error:
            raise self._unwritten(step, error) from error
        self._saving = self._pool.submit(self._finish, step)

    def wait(self) -> None:
        """Waits until the last save is complete; raises RunFailure if it cannot be written."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(self, step: int, params: Any, optimizer: Any) -> Restored:
        """Returns the checkpoint of `step`; the arguments give structure, dtypes and shardings.

        Raises InputError for a step that is not there, does not fit the arguments, or is damaged.
        """
        try:
            items = self._read(step, params=params, optimizer=optimizer)
        except manifest.Damaged as damage:
            raise InputError(self._unreadable(step, damage)) from damage
        return Restored(step, items["params"], items["optimizer"], self._meta(step))

    def restore_newest(self, params: Any, optimizer: Any, *, average: Any = None) -> Restored | None:
        """Returns the newest checkpoint that is whole, or None if there is no checkpoint.

        Damaged ones are announced, and moved to `damaged/` in the run directory. Raises InputError if all are damaged.
        """
        given = {"params": params, "optimizer": optimizer} | ({} if average is None else {AVERAGE: average})
        newest = self._newest_whole(**given)
        if newest is None:
            return None
        step, items = newest
        return Restored(step, items["params"], items["optimizer"], self._meta(step), items.get(AVERAGE))

    def restore_params(self, step: int | None, params: Any) -> Any:
        """Returns only the parameters of `step`, or with None of the newest checkpoint that is whole: their mean, if it
        has one."""
        if step is None:
            newest = self._newest_whole(params=params)
            assert newest is not None, "latest_step has found one"
            return newest[1]["params"]
        try:
            return self._read(step, params=params)["params"]
        except manifest.Damaged as damage:
            raise InputError(self._unreadable(step, damage)) from damage

    def newest_whole(self) -> int:
        """Returns the newest step whose files are what its manifest says; raises InputError if there is none."""

        def check(step: int) -> None:
            if manifest.is_sealed(self._root / str(step)):
                manifest.check(self._root / str(step))

        found = self._first_whole(check)
        if found is None:
            raise InputError(f"{self._workdir} has no finished checkpoint; train for longer, or resume the run")
        return found[0]

    def close(self) -> None:
        """Waits until everything that was saved is complete on disk; raises RunFailure if it cannot be written."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._manager.close()

    def _finish(self, step: int) -> None:
        """Waits for a save, seals it, and removes the checkpoints that it takes the place of."""
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                manifest.write(self._root / str(step))
                self._remove_old()
        except Exception as error:
            raise self._unwritten(step, error) from error

    def _remove_old(self) -> None:
        if self._retention is None:
            return
        for step in superseded([self._saved(step) for step in self.steps()], self._retention):
            # What is left of a removal that is interrupted is no step.
            removed = (self._root / str(step)).rename(self._root / f"{step}{REMOVED}")
            shutil.rmtree(removed, ignore_errors=True)

    def _saved(self, step: int) -> Saved:
        losses = self._meta(step).get("eval_loss") or {}
        when = datetime.datetime.fromtimestamp((self._root / str(step)).stat().st_mtime, datetime.UTC)
        return Saved(step, when, {"loss": losses[max(losses, key=int)]} if losses else None)

    def _newest_whole(self, **items: Any) -> tuple[int, Any] | None:
        """Returns the newest checkpoint that is whole, and what was read of it; None if there is no checkpoint."""
        return self._first_whole(lambda step: self._read(step, **items))

    def _first_whole(self, read: Callable[[int], Any]) -> tuple[int, Any] | None:
        """Returns the newest step that `read` does not find damaged, and what it returns; None if there is no step.

        Those before it are announced and set aside. Raises InputError if all are damaged.
        """
        damaged: list[tuple[int, manifest.Damaged]] = []
        for step in reversed(self.steps()):
            try:
                found = read(step)
            except manifest.Damaged as damage:
                damaged.append((step, damage))
                continue
            for newer, damage in damaged:
                self._announce(f"checkpoint {newer} of {self._workdir} is damaged, {damage}: takes step {step}")
                self._set_aside(newer)
            return step, found
        if damaged:
            newest, damage = damaged[0]
            others = " and the others are damaged too;" if len(damaged) > 1 else ""
            raise InputError(
                f"checkpoint {newest} of {self._workdir} cannot be read: {damage};{others} restore it, or train "
                "again in another --workdir"
            )
        return None

    def _set_aside(self, step: int) -> None:
        """Moves a checkpoint that is unfinished or damaged out of the way of a run that will save that step again."""
        if self._read_only or jax.process_index():
            return
        to = self._workdir / DAMAGED / str(step)
        shutil.rmtree(to, ignore_errors=True)
        to.parent.mkdir(exist_ok=True)
        (self._root / str(step)).rename(to)
        self._manager.reload()

    def _read(self, step: int, **items: Any) -> Any:
        """Returns items of a checkpoint; raises Damaged, or InputError if they are not there or do not fit."""
        if step not in self.steps():
            raise InputError(
                f"there is no checkpoint {step} of {self._workdir} (the newest is {self.latest()}); "
                f"there are {', '.join(map(str, self.steps()))}"
            )
        directory = self._root / str(step)
        if manifest.is_sealed(directory):
            manifest.check(directory)
        if "optimizer" not in items and (directory / AVERAGE).is_dir():
            return {"params": self._read(step, optimizer=None, average=items["params"])[AVERAGE]}
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items() if item is not None}
        try:
            self._check_shapes(step, items.get("params", items.get(AVERAGE)))
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except InputError:
            raise
        except Exception as error:  # Orbax raises bare Exception
            reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
            raise manifest.Damaged(reason) from error

    def _check_shapes(self, step: int, params: Any) -> None:
        """Raises InputError if the saved parameters have other names or shapes; Orbax names neither."""
        metadata = ocp.StandardCheckpointHandler().metadata(self._manager.directory / str(step) / "params")
        saved, given = _shapes(metadata.tree), _shapes(params)
        for name in sorted(saved.keys() | given.keys()):
            before, now = saved.get(name, "absent"), given.get(name, "absent")
            if before != now:
                raise InputError(
                    f"checkpoint {step} of {self._workdir} does not fit: its {name} is {before}, "
                    f"but {CONFIG} gives {now}; restore the {CONFIG} that it was saved with"
                )

    def _all_steps(self) -> list[int]:
        names = (path.name for path in self._root.iterdir()) if self._root.is_dir() else ()
        return sorted(int(name) for name in names if name.isdecimal())

    def _is_unfinished(self, step: int) -> bool:
        """Returns whether a checkpoint lacks the manifest that it was to have: its save was interrupted."""
        return not manifest.is_sealed(self._root / str(step)) and SEALED in self._meta(step)

    def _meta(self, step: int) -> Meta:
        try:
            found = json.loads((self._root / str(step) / "meta" / "metadata").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _unreadable(self, step: int, damage: Exception) -> str:
        older = [other for other in self.steps() if other < step]
        then = f"to resume from step {max(older)}" if older else "and train again"
        directory = self._workdir / CHECKPOINTS / str(step)
        return f"checkpoint {step} of {self._workdir} cannot be read: {damage}; remove {directory} {then}"

    def _unwritten(self, step: int, error: Exception) -> Exception:
        """Returns the failure to report for an error of the file system, and any other error as it is."""
        text = " ".join(str(error).split())
        if not isinstance(error, OSError) and not any(words in text for words in FILE_ERRORS):
            return error
        good = self.latest()
        return RunFailure(
            f"checkpoint {step} of {self._workdir} cannot be written ({text[:200]}); "
            + ("there is no checkpoint yet" if good is None else f"the newest good checkpoint is {good}")
            + ": make room, and run the same command to resume"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def has_checkpoint(workdir: str | Path) -> bool:
    """Returns whether a run has a finished checkpoint."""
    if not (Path(workdir) / CHECKPOINTS).is_dir():
        return False
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.latest() is not None
    finally:
        checkpoints.close()


def latest_step(workdir: str | Path) -> int:
    """Returns the number of updates behind the newest finished checkpoint, or raises InputError."""
    if not (Path(workdir) / CHECKPOINTS).is_dir():
        raise InputError(f"{workdir} has no {CHECKPOINTS}: the run saved nothing yet; train for longer")
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        step = checkpoints.latest()
    finally:
        checkpoints.close()
    if step is None:
        raise InputError(f"{workdir} has no finished checkpoint; train for longer, or resume the run")
    return step


def newest_whole(workdir: str | Path) -> int:
    """Returns the step of the newest checkpoint whose every byte is right; those that are damaged are told on stderr.

    Raises InputError if there is none.
    """
    latest_step(workdir)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.newest_whole()
    finally:
        checkpoints.close()


def load(
    workdir: str | Path,
    *,
    step: int | None = None,
    adjust: Callable[[Config], Config] | None = None,
    mesh: Mesh | None = None,
) -> tuple[CausalLM | MaskedLM, Config, Tokenizer]:
    """Returns (model, config, tokenizer) of a training directory, at its newest checkpoint that is whole or at `step`.

    `adjust` may change the config before the model is made, such as its dtype. The parameters go to the first device,
    or are cut over the axes `fsdp` and `tensor` of a mesh of Auto axes, so that a model may be larger than one card.
    Raises InputError, naming what is missing, for a directory that is not a run or has no finished checkpoint, and for
    a checkpoint that is unreadable.
    """
    config = read_config(workdir)
    config = adjust(config).validate() if adjust else config
    if not (Path(workdir) / TOKENIZER).is_file():
        raise InputError(f"{workdir} has no {TOKENIZER}: the run stopped before training began; start it again")
    tokenizer = tokenizers.load(Path(workdir) / TOKENIZER)
    latest_step(workdir)
    model = nnx.eval_shape(lambda: create(config.model, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(model, nnx.Param)
    if mesh is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        layouts = jax.tree.map(lambda _: first, abstract)
    else:
        layouts = sharding.state_shardings(abstract, mesh)
    abstract = jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), abstract, layouts
    )
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        params = checkpoints.restore_params(step, abstract)
    finally:
        checkpoints.close()
    return nnx.merge(graph, params), config, tokenizer

"""The checkpoints of a run, saved and restored with Orbax, for training and inference alike.

A checkpoint has the items `params`, `optimizer` and `meta`, and `average` if parameters are averaged. "Step k" means
that k updates were made; the data position and the random draws are functions of it. Every byte of one is checked
before it is restored, and a damaged one is skipped for the one before it.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tokenizers import Tokenizer

from odelm import manifest, sharding
from odelm import tokenizer as tokenizers
from odelm.checkpoint_files import SEALED, CheckpointFiles, HeldOutLosses, Meta, latest_step, to_stderr
from odelm.config import Config, TrainConfig
from odelm.errors import InputError, RunFailure, is_out_of_memory
from odelm.models import CausalLM, Classifier, MaskedLM, create
from odelm.models.parameters import name_of
from odelm.processes import together
from odelm.run_directory import CHECKPOINTS, CONFIG, TOKENIZER, read_config

AVERAGE = "average"
"""The item of a checkpoint that has the mean of the parameters."""
FILE_ERRORS = ("No space left", "ENOSPC", "Disk quota", "Permission denied", "Read-only file system")
"""TensorStore's messages for a file system that cannot be written to; its errors have no type of their own."""


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
        announce: Callable[[str], None] = to_stderr,
        after_save: Callable[[], None] = lambda: None,
        evaluated: Callable[[], HeldOutLosses] = dict,
    ):
        """`retention` says which checkpoints stay, None keeps all; `announce` gets a line for each damaged one.

        `after_save` is called by the first process, in another thread, once a checkpoint is complete. `evaluated`
        returns the known held-out losses of the run's steps, also those found after a checkpoint was saved.
        """
        self._files, self._retention, self._announce = CheckpointFiles(workdir), retention, announce
        self._after_save, self._evaluated = after_save, evaluated
        # A reader does not touch unfinished checkpoints: a run that is in progress may be writing them.
        self._read_only = read_only
        self._on_first_process(self._files.clean)
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=not read_only, read_only=read_only, create=not read_only
        )
        self._manager = ocp.CheckpointManager(self._files.root, options=options)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self._failed = False
        # Kept, because the manifest of the last save appears at a different moment for each process.
        self._taken = set(self._files.steps())

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, ascending; damaged ones are among them until they are read."""
        return self._files.steps()

    def latest(self) -> int | None:
        """Returns the newest finished step, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, params: Any, optimizer: Any, meta: Meta | None = None, *, average: Any = None) -> None:
        """Saves in the background; `step` is the number of updates made. A step already there stays as it is.

        `average` is the mean of the parameters that is to be loaded in their place, None if there is none.

        Raises RunFailure if this save, or the one before it, cannot be written, in any of the processes.
        """
        self.wait_together()
        if step in self._taken:
            return
        items = {"params": params, "optimizer": optimizer} | ({} if average is None else {AVERAGE: average})
        arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        said = ocp.args.JsonSave({"step": step, SEALED: 1} | (meta or {}))
        try:
            saved = self._manager.save(step, args=ocp.args.Composite(**arrays, meta=said))
        except Exception as error:
            raise self._unwritten(step, error) from error
        if not saved:
            raise RuntimeError(f"step {step} was not saved: the newest checkpoint is already {self.latest()}")
        self._taken.add(step)
        self._saving = self._pool.submit(self._finish, step)

    def wait(self) -> None:
        """Waits until the last save is complete; raises RunFailure if it cannot be written."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def wait_together(self) -> None:
        """Waits as `wait` does, in all processes; raises RunFailure in all of them if one of them does."""
        with together("saving"):
            self.wait()

    def retain(self) -> None:
        """Removes the checkpoints that need not stay, by the losses that are known now."""
        self.wait_together()
        with together("removing checkpoints"):
            if jax.process_index() == 0 and self._retention is not None:
                try:
                    self._files.remove_superseded(self._retention, self._evaluated)
                    self._after_save()
                except Exception as error:
                    raise self._unwritten(self.latest() or 0, error) from error

    def restore_newest(self, params: Any, optimizer: Any, *, average: Any = None) -> Restored | None:
        """Returns the newest checkpoint that is whole, or None if there is no checkpoint.

        The arguments give structure, dtypes and shardings. Damaged checkpoints are announced, and moved to `damaged/`
        in the run directory. Raises InputError if all are damaged, and if one does not fit the arguments.
        """
        given = {"params": params, "optimizer": optimizer} | ({} if average is None else {AVERAGE: average})
        newest = self._files.first_whole(lambda step: self._read(step, **given), self._announce)
        if newest is None:
            return None
        step, items, damaged = newest
        if damaged and not self._read_only:
            self._on_first_process(lambda: self._files.set_aside(damaged))
            self._manager.reload()
            self._taken -= set(damaged)
        return Restored(step, items["params"], items["optimizer"], self._files.meta(step), items.get(AVERAGE))

    def restore_params(self, step: int | None, params: Any) -> Any:
        """Returns only the parameters of `step`, or with None of the newest checkpoint that is whole: their mean, if it
        has one."""
        if step is None:
            newest = self._files.first_whole(lambda step: self._read_params(step, params), self._announce)
            assert newest is not None, "latest_step has found one"
            return newest[1]
        steps = self.steps()
        if step not in steps:
            raise InputError(
                f"there is no checkpoint {step} of {self._files.workdir} (the newest is {self.latest()}); "
                f"there are {', '.join(map(str, steps))}"
            )
        try:
            return self._read_params(step, params)
        except manifest.Damaged as damage:
            older = [other for other in steps if other < step]
            then = f"to resume from step {max(older)}" if older else "and train again"
            raise InputError(
                f"checkpoint {step} of {self._files.workdir} cannot be read: {damage}; "
                f"remove {self._files.workdir / CHECKPOINTS / str(step)} {then}"
            ) from damage

    def close(self) -> None:
        """Waits until everything that was saved is complete on disk; raises RunFailure if it cannot be written."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            try:
                self._manager.close()
            except Exception:
                # It raises the error of a failed save again.
                if not self._failed:
                    raise

    def _finish(self, step: int) -> None:
        """Waits for a save, seals it, and removes the checkpoints that it replaces."""
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                self._files.seal(step)
                if self._retention is not None:
                    self._files.remove_superseded(self._retention, self._evaluated)
                self._after_save()
        except Exception as error:
            self._failed = True
            raise self._unwritten(step, error) from error

    def _on_first_process(self, change: Callable[[], None]) -> None:
        """Lets one process change the files of a run that it writes, and the others wait for it."""
        if self._read_only:
            return
        if jax.process_index() == 0:
            change()
        multihost_utils.sync_global_devices("checkpoint files")

    def _read_params(self, step: int, params: Any) -> Any:
        """Returns the parameters to evaluate: the mean, if the checkpoint has one."""
        name = AVERAGE if (self._files.directory(step) / AVERAGE).is_dir() else "params"
        return self._read(step, **{name: params})[name]

    def _read(self, step: int, **items: Any) -> Any:
        """Returns items of a checkpoint; raises Damaged, or InputError if they do not fit."""
        self._files.check(step)
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        try:
            for name in items.keys() - {"optimizer"}:
                self._check_shapes(step, name, items[name])
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except InputError:
            raise
        except Exception as error:  # Orbax raises bare Exception
            if is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
            raise manifest.Damaged(reason) from error

    def _check_shapes(self, step: int, item: str, params: Any) -> None:
        """Raises InputError if the saved parameters have other names or shapes; Orbax names neither."""
        metadata = ocp.StandardCheckpointHandler().metadata(self._manager.directory / str(step) / item)
        saved, given = _shapes(metadata.tree), _shapes(params)
        for name in sorted(saved.keys() | given.keys()):
            before, now = saved.get(name, "absent"), given.get(name, "absent")
            if before != now:
                raise InputError(
                    f"checkpoint {step} of {self._files.workdir} does not fit: its {name} is {before}, "
                    f"but {CONFIG} gives {now}; restore the {CONFIG} that it was saved with"
                )

    def _unwritten(self, step: int, error: Exception) -> Exception:
        """Returns the failure to report for an error of the file system, and any other error as it is."""
        text = " ".join(str(error).split())
        reason = next((words for words in FILE_ERRORS if words in text), None)
        if reason is None and not isinstance(error, OSError):
            return error
        good, told = self.latest(), text[:200]
        if reason is not None and reason not in told:
            told = f"{reason}: {told}"
        return RunFailure(
            f"checkpoint {step} of {self._files.workdir} cannot be written ({told}); "
            + ("there is no checkpoint yet" if good is None else f"the newest good checkpoint is {good}")
            + ": make room, and run the same command to resume"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def load(
    workdir: str | Path,
    *,
    step: int | None = None,
    adjust: Callable[[Config], Config] | None = None,
    mesh: Mesh | None = None,
) -> tuple[CausalLM | MaskedLM | Classifier, Config, Tokenizer]:
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
    abstract = jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
        abstract,
        sharding.placements(abstract, mesh),
    )
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        params = checkpoints.restore_params(step, abstract)
    finally:
        checkpoints.close()
    return nnx.merge(graph, params), config, tokenizer

"""The checkpoints of a run, saved and restored with Orbax, for training and inference alike.

A checkpoint, `checkpoints/<step>/` in the run directory, has the items `params`, `optimizer` and `meta`. "Step k"
means that k updates were applied; the data position and the random draws are functions of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from tokenizers import Tokenizer

from odelm import tokenizer as tokenizers
from odelm.config import Config
from odelm.errors import InputError
from odelm.models import CausalLM, MaskedLM, create
from odelm.models.parameters import name_of
from odelm.run_directory import CHECKPOINTS, CONFIG, TOKENIZER, read_config


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous; a step exists once it is complete."""

    def __init__(self, workdir: str | Path, *, keep: int | None = None, read_only: bool = False):
        # A reader does not touch unfinished checkpoints: a run that is in progress may be writing them.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=not read_only, read_only=read_only, create=not read_only
        )
        self._workdir = Path(workdir)
        self._manager = ocp.CheckpointManager((self._workdir / CHECKPOINTS).absolute(), options=options)

    def latest(self) -> int | None:
        """Returns the newest finished step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, optimizer: Any) -> None:
        """Saves in the background; `step` is the number of updates applied. A step already there stays as it is."""
        if step in self._manager.all_steps():
            return
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                meta=ocp.args.JsonSave({"step": step}),
            ),
        )
        if not saved:
            raise RuntimeError(f"step {step} was not saved: the newest checkpoint is already {self.latest()}")

    def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any]:
        """Returns (params, optimizer) of `step`; the arguments give structure, dtypes and shardings.

        Raises InputError for a step that is not there, does not fit the arguments, or is damaged.
        """
        items = self._restored(step, params=params, optimizer=optimizer)
        return items["params"], items["optimizer"]

    def restore_params(self, step: int, params: Any) -> Any:
        """Returns only the parameters of `step`; raises as `restore` does."""
        return self._restored(step, params=params)["params"]

    def _restored(self, step: int, **items: Any) -> Any:
        steps = sorted(self._manager.all_steps())
        if step not in steps:
            raise InputError(
                f"there is no checkpoint {step} of {self._workdir} (the newest is {self.latest()}); "
                f"there are {', '.join(map(str, steps))}"
            )
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        try:
            self._check_shapes(step, items["params"])
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except InputError:
            raise
        except Exception as error:  # Orbax raises bare Exception
            raise InputError(self._unreadable(step, error)) from error

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

    def _unreadable(self, step: int, error: Exception) -> str:
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        older = [other for other in self._manager.all_steps() if other < step]
        then = f"to resume from step {max(older)}" if older else "and train again"
        return f"checkpoint {step} of {self._workdir} cannot be read: {reason}; remove {self._directory(step)} {then}"

    def _directory(self, step: int) -> Path:
        return self._workdir / CHECKPOINTS / str(step)

    def close(self) -> None:
        """Waits until everything that was saved is complete on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


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


def load(
    workdir: str | Path, *, step: int | None = None, adjust: Callable[[Config], Config] | None = None
) -> tuple[CausalLM | MaskedLM, Config, Tokenizer]:
    """Returns (model, config, tokenizer) of a training directory, at its newest checkpoint or at `step`.

    `adjust` may change the config before the model is made, such as its dtype. Raises InputError, naming what is
    missing, for a directory that is not a run or has no finished checkpoint, and for a checkpoint that is unreadable.
    """
    config = read_config(workdir)
    config = adjust(config).validate() if adjust else config
    if not (Path(workdir) / TOKENIZER).is_file():
        raise InputError(f"{workdir} has no {TOKENIZER}: the run stopped before training began; start it again")
    tokenizer = tokenizers.load(Path(workdir) / TOKENIZER)
    newest = latest_step(workdir)
    model = nnx.eval_shape(lambda: create(config.model, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(model, nnx.Param)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        params = checkpoints.restore_params(newest if step is None else step, abstract)
    finally:
        checkpoints.close()
    return nnx.merge(graph, params), config, tokenizer

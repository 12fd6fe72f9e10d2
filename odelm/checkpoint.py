"""Saving and restoring runs with Orbax, for training and inference alike.

A run directory holds `config.json`, `tokenizer.json` and `checkpoints/<step>/`, each checkpoint the items
`params`, `optimizer` and `meta`. "Step k" means that k updates were applied; the data position and the random
draws are functions of it.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from odelm.config import Config, from_json, to_json
from odelm.errors import InputError
from odelm.models import CausalLM, MaskedLM, create

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer.json", "checkpoints"


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous; a step exists once it is whole."""

    def __init__(self, workdir: str | Path, *, keep: int | None = None, read_only: bool = False):
        # A reader leaves unfinished checkpoints alone: a run that is still going may be writing them.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=not read_only, read_only=read_only, create=not read_only
        )
        self._manager = ocp.CheckpointManager((Path(workdir) / CHECKPOINTS).absolute(), options=options)

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
        """Returns (params, optimizer) of `step`; the arguments give structure, dtypes and shardings."""
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params), optimizer=ocp.args.StandardRestore(optimizer)
            ),
        )
        return items["params"], items["optimizer"]

    def restore_params(self, step: int, params: Any) -> Any:
        """Returns the parameters of `step` alone."""
        return self._manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(params)))["params"]

    def close(self) -> None:
        """Waits until what was saved is whole on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


def save_config(workdir: Path, config: Config) -> None:
    write_text(workdir / CONFIG, to_json(config))


def read_config(workdir: str | Path) -> Config:
    """Returns the validated config of a run directory, or raises InputError."""
    path = Path(workdir) / CONFIG
    if not Path(workdir).is_dir():
        raise InputError(f"{workdir} is not a directory; give the --workdir of a training run")
    if not path.is_file():
        raise InputError(f"{workdir} has no {CONFIG}, so it is not a run; give the --workdir of a training run")
    try:
        return from_json(path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); restore it, or train again") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def has_checkpoint(workdir: str | Path) -> bool:
    """Tells whether a run has a finished checkpoint."""
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
) -> tuple[CausalLM | MaskedLM, Config, "Tokenizer"]:
    """Returns (model, config, tokenizer) of a training directory, at its newest checkpoint or at `step`.

    `adjust` may change the config before the model is made, such as its dtype. Raises InputError, naming what
    is missing, for a directory that is no run or has no finished checkpoint.
    """
    from odelm.data import tokenizer as tokenizers

    config = read_config(workdir)
    config = adjust(config).validate() if adjust else config
    if not (Path(workdir) / TOKENIZER).is_file():
        raise InputError(f"{workdir} has no {TOKENIZER}: the run stopped before training began; start it again")
    tokenizer = tokenizers.load(Path(workdir) / TOKENIZER)
    newest = latest_step(workdir)
    found = newest if step is None else step
    model = nnx.eval_shape(lambda: create(config.model, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(model, nnx.Param)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        try:
            params = checkpoints.restore_params(found, abstract)
        except (FileNotFoundError, KeyError, ValueError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"checkpoint {found} of {workdir} cannot be read: {line} (the newest is {newest})"
            ) from error
    finally:
        checkpoints.close()
    return nnx.merge(graph, params), config, tokenizer


def differences(saved: Config, given: Config, ignored: frozenset[str]) -> list[str]:
    """Returns "path: saved -> given" for every option that differs, apart from the ignored paths."""
    found = []
    for part in dataclasses.fields(Config):
        old, new = getattr(saved, part.name), getattr(given, part.name)
        for option in dataclasses.fields(old):
            path = f"{part.name}.{option.name}"
            before, after = getattr(old, option.name), getattr(new, option.name)
            if path not in ignored and before != after:
                found.append(f"{path}: {before!r} -> {after!r}")
    return found

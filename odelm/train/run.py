"""A training run: checked, its data prepared, its state made or restored, and handed to the loop."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from odelm import sharding
from odelm.checkpoint import Checkpoints, Meta
from odelm.checkpoint_files import CheckpointFiles, newest_whole
from odelm.config import Config, ModelConfig, replace
from odelm.data.examples import TaskData, read_task_data
from odelm.data.loader import eval_batches, train_batches
from odelm.data.prepare import prepare
from odelm.data.tokens import Prepared
from odelm.errors import InputError
from odelm.files import is_url
from odelm.processes import together
from odelm.remote import Remote, local_copy
from odelm.run_directory import RunDirectory
from odelm.train.health import Losses, token_entropy
from odelm.train.log import Log, check_wandb, evaluated
from odelm.train.loop import Loop, Result
from odelm.train.optimizer import make_optimizer, schedule_change
from odelm.train.prefetch import Prefetch
from odelm.train.profile import Profile
from odelm.train.start import Start, find_start
from odelm.train.step import TrainState, graph_of, init_state, make_update, with_params
from odelm.train.task import make_held_out
from odelm.train.teacher import load_teacher
from odelm.version import __version__


def train(config: Config, workdir: str | Path, *, profile: int = 0, wandb: str = "") -> Result:
    """Trains in `workdir`, from its newest checkpoint if it has one, and returns how the run ended.

    A workdir that is a URL is trained in a directory of this machine and copied there (`odelm.remote`). With `profile`
    that many updates are traced into the workdir's `profile/`; with `wandb`, the name of a Weights & Biases project,
    metrics go there too.

    Raises InputError, before anything is written to the workdir, for an invalid config or a workdir that holds another
    run.
    """
    config.init.validate()
    if wandb:
        check_wandb()
    remote = None
    if is_url(workdir):
        url, workdir = str(workdir), local_copy(str(workdir))
        remote = _opened(url, workdir)
    directory = RunDirectory(workdir)
    with contextlib.ExitStack() as held:
        start = find_start(config, directory)  # reads the checkpoint of a run, where processes wait for each other
        with together("getting ready"):
            config = _with_updates_made(start.config, directory)
            check_trainable(config.model)
            mesh = sharding.make_mesh(config.mesh)
            sharding.check_batch(config.train.batch_size, mesh, accumulate=config.train.accumulate)
            directory.check_config(config)
            if jax.process_index() == 0:
                held.enter_context(directory.locked())
            prepared = (read_task_data if config.data.task else prepare)(config, tokenizer_file=start.tokenizer)
            directory.check_data(config.data, prepared.tokenizer, prepared.digest)
            _check_batches(config, prepared, mesh)
        teacher = load_teacher(config, prepared.tokenizer, mesh)
        optimizer = make_optimizer(config.optimizer, config.train.updates, config.model)
        # A mesh that does not divide the parameters is found here, while nothing is written.
        state = dataclasses.replace(_initial_state(start, optimizer, mesh), teacher=teacher)
        with together("writing what the run is"):
            if jax.process_index() == 0:
                directory.write(config, prepared.tokenizer, prepared.digest)
        summary = None if start.pretrained is None else start.pretrained.summary
        del start  # frees the pretrained model
        after_save = (lambda: None) if remote is None else remote.push
        result = _run(config, directory, prepared, mesh, optimizer, state, summary, profile, wandb, after_save)
        if remote is not None and jax.process_index() == 0:
            remote.close()
        return result


def _with_updates_made(config: Config, directory: RunDirectory) -> Config:
    """Returns the config with the number of updates that the run has made, if it asks for fewer: no update is undone,
    and `config.json` and reports stay true of the run."""
    if max(CheckpointFiles(directory.path).steps(), default=0) <= config.train.updates:
        return config
    return replace(config, {"train.updates": max(newest_whole(directory.path), config.train.updates)})


def _opened(url: str, workdir: Path) -> Remote:
    """Returns the run at a URL, after fetching what it has and the workdir lacks."""
    remote = Remote(url, workdir, print)
    if jax.process_index() == 0:
        print(f"{url} is trained in {workdir}, and copied after each checkpoint")
        remote.fetch()
    multihost_utils.sync_global_devices("fetched")
    return remote


def check_trainable(model: ModelConfig) -> None:
    """Raises InputError for float16, in which small gradients become zero unless the loss is scaled."""
    for name in ("dtype", "residual_dtype"):
        if getattr(model, name) == "float16":
            raise InputError(
                f"model.{name} is 'float16', in which gradients underflow; train in 'bfloat16', which has the range "
                "of float32 (inference takes float16)"
            )


def _check_batches(config: Config, prepared: Prepared | TaskData, mesh: Mesh) -> None:
    """Raises InputError for batches that cannot be made: builds the loaders once, before the run is written."""
    train_batches(prepared, config, process_count=sharding.batch_share(mesh)[1])
    if isinstance(prepared, Prepared):
        eval_batches(prepared, config)


def _initial_state(start: Start, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    state = init_state(start.config, optimizer, mesh)
    return state if start.pretrained is None else with_params(state, nnx.state(start.pretrained.model, nnx.Param))


def _run(
    config: Config,
    directory: RunDirectory,
    prepared: Prepared | TaskData,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    summary: str | None,
    profile: int,
    wandb: str,
    after_save: Callable[[], None],
) -> Result:
    process = jax.process_index()
    checkpoints = Checkpoints(
        directory.path,
        retention=config.train,
        announce=print if process == 0 else lambda _: None,
        after_save=after_save,
        evaluated=lambda: evaluated(directory.path, config.train.eval_batches),
    )
    try:
        state, meta = _restored(state, checkpoints)
        start = int(state.step)
        graph, _ = graph_of(config)
        with Log(
            directory.path, updates=config.train.updates, start=start, enabled=process == 0,
            wandb=wandb, options=dataclasses.asdict(config),
        ) as log:  # fmt: skip
            _print_summary(log, config, state, prepared, mesh, summary)
            _print_new_schedule(log, config, directory.config, start)
            loop = Loop(
                config=config,
                mesh=mesh,
                update=make_update(config, graph, optimizer),
                batches=_batches(prepared, config, mesh, start),
                held_out=make_held_out(config, graph, prepared, mesh, log),
                checkpoints=checkpoints,
                log=log,
                **_records(config, meta, start),
                facts=_facts(prepared),
                entropy=token_entropy(prepared),
                profile=Profile(directory.path, profile if process == 0 else 0),
            )
            result = loop(state)
        checkpoints.wait_together()
        return result
    finally:
        checkpoints.close()


def _batches(prepared: Prepared | TaskData, config: Config, mesh: Mesh, start: int) -> Prefetch:
    share, shares = sharding.batch_share(mesh)
    return Prefetch(train_batches(prepared, config, start=start, process_index=share, process_count=shares), mesh)


def _print_new_schedule(log: Log, config: Config, saved: Config | None, step: int) -> None:
    """Prints how the learning rate changes where a run is resumed with another number of updates."""
    now = config.train.updates
    before = now if saved is None else saved.train.updates
    if 0 < step < now and (change := schedule_change(before, now, config.optimizer, step)):
        log.print(change)


def _restored(state: TrainState, checkpoints: Checkpoints) -> tuple[TrainState, Meta]:
    """Returns the state of the newest intact checkpoint, and its metadata; `state` if there is none."""
    found = checkpoints.restore_newest(state.params, state.optimizer, average=state.average)
    if found is None:
        return state, {}

    def scalar(value: int) -> jax.Array:
        return jax.device_put(jax.numpy.int32(value), state.step.sharding)

    skipped = scalar(found.meta.get("skipped", 0))
    restored = TrainState(
        scalar(found.step), found.params, found.optimizer, skipped, found.average, state.teacher
    )  # fmt: skip
    return restored, found.meta


def _records(config: Config, meta: Meta, step: int) -> dict[str, Any]:
    """Returns what a run that starts from a checkpoint knows of its records: the updates since the last one, the tokens
    read by then, and the losses of the last records. Checkpoints before 0.2 lack the number of tokens: their batches
    are taken to be without padding."""
    padded = config.train.batch_size * config.train.length
    unrecorded = [{"tokens": padded} | metrics for metrics in meta.get("window", ())]
    read = meta.get("read", (step - len(unrecorded)) * padded)
    return {"unrecorded": unrecorded, "read": read, "recent": Losses(meta.get("recent", ()))}


def _facts(prepared: Prepared | TaskData) -> Meta:
    """Returns the facts that each checkpoint stores about how it was made."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
    tokenizer = hashlib.sha256(prepared.tokenizer.to_str().encode()).hexdigest()
    return {"versions": {"odelm": __version__} | versions, "tokenizer_sha256": tokenizer, "tokens": prepared.digest}


def _print_summary(
    log: Log, config: Config, state: TrainState, prepared: Prepared | TaskData, mesh: Mesh, summary: str | None
) -> None:
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    model = config.model
    log.print(
        f"{model.kind}, {size / 1e6:.2f} M parameters, width {model.width}, depth {model.depth}, "
        f"groups {model.groups}, on {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    if mesh.size > 1:
        log.print("mesh: " + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
        for line in sharding.summary(state.params, mesh):
            log.print(line)
    amount = prepared.summary if isinstance(prepared, TaskData) else f"{prepared.train_tokens:,} training tokens"
    log.print(f"{amount}; depth steps drawn: {config.step_sampling.kind}")
    if model.core not in config.trained_counts:
        log.print(f"full depth, {model.core} steps, is never drawn: the model will not be trained at it")
    if int(state.step):
        log.print(f"resumed after update {int(state.step)}")
    elif summary is not None:
        log.print(summary)

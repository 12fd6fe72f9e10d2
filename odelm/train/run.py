"""A training run: checked, its data prepared, its state made or restored, and handed to the loop."""

from pathlib import Path

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from odelm import sharding
from odelm.checkpoint import Checkpoints
from odelm.config import Config, ModelConfig
from odelm.data.loader import eval_batches, train_batches
from odelm.data.prepare import prepare
from odelm.data.tokens import Prepared
from odelm.errors import InputError
from odelm.run_directory import RunDirectory
from odelm.train.evaluate import HeldOut
from odelm.train.log import Log
from odelm.train.loop import Loop, Result
from odelm.train.optimizer import make_optimizer
from odelm.train.prefetch import Prefetch
from odelm.train.start import Start, find_start
from odelm.train.step import TrainState, graph_of, init_state, make_update, with_params


def train(config: Config, workdir: str | Path) -> Result:
    """Trains in `workdir`, from its newest checkpoint if it has one, and returns how that ended.

    Raises InputError, before anything is written there, for an invalid config or a workdir that holds another run.
    """
    config.init.validate()
    directory = RunDirectory(workdir)
    start = find_start(config, directory)
    config = start.config
    check_trainable(config.model)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch_size, mesh)
    directory.check_config(config)
    prepared = prepare(config, tokenizer_file=start.tokenizer)
    directory.check_data(config.data, prepared.tokenizer, prepared.digest)
    _check_batches(config, prepared)
    if jax.process_index() == 0:
        directory.write(config, prepared.tokenizer, prepared.digest)
    optimizer = make_optimizer(config.optimizer, config.train.updates)
    state = _initial_state(start, optimizer, mesh)
    summary = None if start.pretrained is None else start.pretrained.summary
    del start  # frees the pretrained model
    return _run(config, directory, prepared, mesh, optimizer, state, summary)


def check_trainable(model: ModelConfig) -> None:
    """Raises InputError for float16, in which small gradients become zero unless the loss is scaled."""
    for name in ("dtype", "residual_dtype"):
        if getattr(model, name) == "float16":
            raise InputError(
                f"model.{name} is 'float16', in which gradients underflow; train in 'bfloat16', which has the range "
                "of float32 (inference takes float16)"
            )


def _check_batches(config: Config, prepared: Prepared) -> None:
    """Raises InputError for batches that cannot be made: builds the loaders once, before the run is written."""
    train_batches(prepared, config, process_count=jax.process_count())
    eval_batches(prepared, config)


def _initial_state(start: Start, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    state = init_state(start.config, optimizer, mesh)
    return state if start.pretrained is None else with_params(state, nnx.state(start.pretrained.model, nnx.Param))


def _run(
    config: Config,
    directory: RunDirectory,
    prepared: Prepared,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    summary: str | None,
) -> Result:
    checkpoints = Checkpoints(directory.path, keep=config.train.keep)
    try:
        state = _restored(state, checkpoints)
        start, process = int(state.step), jax.process_index()
        graph, _ = graph_of(config)
        with Log(directory.path, updates=config.train.updates, start=start, enabled=process == 0) as log:
            _print_summary(log, config, state, prepared, summary)
            rows = train_batches(
                prepared, config, start=start, process_index=process, process_count=jax.process_count()
            )
            held_out = HeldOut(config, graph, prepared, mesh, log)
            update = make_update(config, graph, optimizer)
            loop = Loop(config, mesh, update, Prefetch(rows, mesh), held_out, checkpoints, log)
            return loop(state)
    finally:
        checkpoints.close()


def _restored(state: TrainState, checkpoints: Checkpoints) -> TrainState:
    """Returns the state of the newest checkpoint, or `state` if there is none."""
    step = checkpoints.latest()
    if step is None:
        return state
    params, optimizer = checkpoints.restore(step, state.params, state.optimizer)
    return TrainState(jax.device_put(jax.numpy.int32(step), state.step.sharding), params, optimizer)


def _print_summary(log: Log, config: Config, state: TrainState, prepared: Prepared, summary: str | None) -> None:
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    model = config.model
    log.print(
        f"{model.kind}, {size / 1e6:.2f} M parameters, width {model.width}, depth {model.depth}, "
        f"groups {model.groups}, on {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    log.print(f"{prepared.train_tokens:,} training tokens; depth steps drawn: {config.step_sampling.kind}")
    if model.core not in config.trained_counts:
        log.print(f"full depth, {model.core} steps, is never drawn: the model will not be trained at it")
    if int(state.step):
        log.print(f"resumed after update {int(state.step)}")
    elif summary is not None:
        log.print(summary)

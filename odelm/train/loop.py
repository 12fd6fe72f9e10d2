"""The loop: prepare, compile, then update, log, evaluate and save until done or interrupted."""

import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from odelm import checkpoint, sharding
from odelm import tokenizer as tokenizers
from odelm.checkpoint import Checkpoints
from odelm.config import Config, ModelConfig, changed_options
from odelm.data.loader import eval_batches, train_batches
from odelm.data.prepare import Prepared, prepare
from odelm.errors import InputError
from odelm.files import write_text
from odelm.pretrained import Start, adopted, starting_point
from odelm.train.draws import draw_grid, possible_counts
from odelm.train.evaluate import LossFunction, evaluate, make_loss
from odelm.train.interrupt import Interrupt
from odelm.train.log import Log
from odelm.train.optimizer import make_optimizer, schedule
from odelm.train.step import TrainState, compile_updates, graph_of, init_state, make_update, with_params

AHEAD = 2
"""Updates that may be under way on the device while the next batch is fetched: one that runs, one that waits."""
TOKENS = "tokens.sha256"
"""Names the file of a run that says on which tokens it is trained."""

MAY_CHANGE = frozenset(
    {"mesh.data", "data.data_dir", "data.workers"}
    | {f"train.{name}" for name in ("updates", "eval_every", "eval_batches", "eval_steps", "checkpoint_every")}
    | {f"train.{name}" for name in ("keep", "log_every", "unroll", "remat")}
)
"""Options with which a run may be resumed though they differ; any other would make it another run."""


@dataclass(frozen=True)
class Result:
    """How a run ended: updates applied, the last held-out losses by step count, and whether it was interrupted."""

    step: int
    losses: dict[int, float]
    interrupted: bool


def train(config: Config, workdir: str | Path) -> Result:
    """Trains in `workdir`, from its newest checkpoint if it has one, and returns how it ended.

    Raises InputError for a config that cannot be, or a workdir that holds a different run.
    """
    workdir = Path(workdir)
    config.init.validate()
    config, source = _with_source(config, workdir)
    check_trainable(config.validate().model)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch_size, mesh)
    _check_same_run(config, workdir)
    prepared = prepare(config, tokenizer_file=_tokenizer_file(config, source, workdir))
    _check_same_data(config, prepared, workdir)
    _check_batches(config, prepared)
    _open_workdir(config, workdir, prepared)

    graph, _ = graph_of(config)
    optimizer = make_optimizer(config.optimizer, config.train.updates)
    state = init_state(config, optimizer, mesh)
    summary = None if source is None else source.summary
    if source is not None:
        state = with_params(state, nnx.state(source.model, nnx.Param))
        del source
    checkpoints = Checkpoints(workdir, keep=config.train.keep)
    try:
        state = _restored(state, checkpoints)
        start = int(state.step)
        with Log(workdir, updates=config.train.updates, start=start, enabled=jax.process_index() == 0) as log:
            _introduce(log, config, state, prepared, start, summary)
            run = _Run(config, prepared, mesh, graph, make_update(config, graph, optimizer), checkpoints, log)
            with Interrupt() as interrupt:
                return run(state, interrupt)
    finally:
        checkpoints.close()


@dataclass(frozen=True)
class _Run:
    config: Config
    prepared: Prepared
    mesh: jax.sharding.Mesh
    graph: Any
    update: Any
    checkpoints: Checkpoints
    log: Log

    def __call__(self, state: TrainState, interrupt: Interrupt) -> Result:
        config = self.config
        start = int(state.step)
        recorded = self._recorded(start)
        if start >= config.train.updates and recorded:
            self.log.print(f"already finished: {start} updates; raise --config.train.updates to go on")
            return Result(start, recorded, interrupted=False)
        batches = _Batches(self.prepared, config, self.mesh, start)
        held_out = self._held_out()
        loss = make_loss(self.graph)
        before = self._before(loss, state, held_out)
        losses: dict[int, float] = {}
        step = start
        batch = batches.next()
        counts = possible_counts(config) if start < config.train.updates else ()
        updates = compile_updates(self.update, state, batch, counts, self.mesh, self.log.print)
        rate = schedule(config.optimizer, config.train.updates)
        batches.waited()
        window, since = [], time.perf_counter()
        while step < config.train.updates and not interrupt.requested:
            grid = draw_grid(config, step)
            state, metrics = updates[len(grid) - 1](state, batch, grid)
            step += 1
            window.append(metrics)
            batch = batches.next_after(metrics)
            if step % config.train.log_every == 0 or step == config.train.updates:
                window = [{name: float(value) for name, value in m.items()} for m in jax.device_get(window)]
                now = time.perf_counter()
                times = {"seconds": now - since, "waited": batches.waited()}
                self._record(step, window, len(grid) - 1, jax.numpy.asarray(rate(step - 1)).item(), **times)
                window, since = [], now
            if step % config.train.eval_every == 0 and step < config.train.updates:
                paused = time.perf_counter()
                losses = evaluate(loss, state.params, held_out, config)
                self.log.evaluation(step, losses, config.train.eval_batches)
                since += time.perf_counter() - paused
            if step % config.train.checkpoint_every == 0:
                self.checkpoints.save(step, state.params, state.optimizer)
        self.checkpoints.save(step, state.params, state.optimizer)
        if interrupt.requested and step < config.train.updates:
            self.log.print(f"interrupted after update {step}; run the same command to resume from there")
            return Result(step, losses, interrupted=True)
        losses = evaluate(loss, state.params, held_out, config)
        self.log.evaluation(step, losses, config.train.eval_batches)
        self.log.comparison(before, losses)
        return Result(step, losses, interrupted=False)

    def _before(self, loss: LossFunction, state: TrainState, held_out: list[dict[str, jax.Array]]) -> dict[int, float]:
        """Returns the losses of the model that training started from, evaluated once; {} if that was a new one."""
        if not self.config.init.from_pretrained:
            return {}
        losses = self._recorded(0)
        if not losses and int(state.step) == 0:
            losses = evaluate(loss, state.params, held_out, self.config)
            self.log.evaluation(0, losses, self.config.train.eval_batches)
        return losses

    def _recorded(self, step: int) -> dict[int, float]:
        """Returns the losses of the evaluation asked for if it was made before, else {}: the same on every process."""
        counts = self.config.eval_steps
        found = self.log.evaluated(step, self.config.train.eval_batches)
        losses = multihost_utils.broadcast_one_to_all(np.array([found.get(count, np.nan) for count in counts]))
        return {} if np.isnan(losses).any() else dict(zip(counts, losses.tolist(), strict=True))

    def _held_out(self) -> list[dict[str, jax.Array]]:
        """Returns the evaluated batches, cut along the batch like those of training."""
        rows = self.config.train.batch_size // jax.process_count()
        mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
        batches = eval_batches(self.prepared, self.config, limit=self.config.train.eval_batches)
        return [sharding.place_batch({name: a[mine] for name, a in b.items()}, self.mesh) for b in batches]

    def _record(
        self, step: int, window: list[dict[str, float]], steps: int, rate: float, *, seconds: float, waited: float
    ) -> None:
        tokens = self.config.train.batch_size * self.config.train.length
        self.log.training(
            step,
            {
                "loss": sum(float(m["loss"]) for m in window) / len(window),
                "gradient_norm": float(window[-1]["gradient_norm"]),
                "learning_rate": rate,
                "depth_steps": steps,
                "tokens": step * tokens,
                "tokens_per_s": len(window) * tokens / seconds,
                "data_wait": waited / seconds,
            },
        )


class _Batches:
    """Global batches from update `start` on, and how long they were waited for: near no time where data keep up, and
    never less than the device stands still for want of them."""

    def __init__(self, prepared: Prepared, config: Config, mesh: jax.sharding.Mesh, start: int):
        processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
        self._mesh, self._batches = mesh, train_batches(prepared, config, start=start, **processes)
        self._waited = 0.0
        self._under_way: deque[Any] = deque(maxlen=AHEAD)

    def next_after(self, metrics: Any) -> dict[str, jax.Array]:
        """Returns the next batch, once no more than `AHEAD` updates are under way, of which `metrics` are the last.

        A loop that runs ahead of the device would wait for batches which the device does not need yet.
        """
        if len(self._under_way) == AHEAD:
            jax.block_until_ready(self._under_way[0])
        self._under_way.append(metrics)
        return self.next()

    def next(self) -> dict[str, jax.Array]:
        """Returns the next batch."""
        since = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - since
        return sharding.place_batch(batch, self._mesh)

    def waited(self) -> float:
        """Returns the seconds that were waited for data since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited


def check_trainable(model: ModelConfig) -> None:
    """Raises InputError for float16, in which small gradients become zero unless the loss is scaled."""
    for name in ("dtype", "residual_dtype"):
        if getattr(model, name) == "float16":
            raise InputError(
                f"model.{name} is 'float16', in which gradients underflow; train in 'bfloat16', which has the range "
                "of float32 (inference takes float16)"
            )


def _with_source(config: Config, workdir: Path) -> tuple[Config, Start | None]:
    """Returns the config with the model of `config.init`, and that model unless the run already has its own."""
    if not config.init.from_pretrained:
        return config, None
    if (workdir / checkpoint.CONFIG).exists():
        saved = checkpoint.read_config(workdir)
        if saved.init == config.init:
            config = replace(config, model=adopted(config.model, saved.model))
            if checkpoint.has_checkpoint(workdir):
                return config, None
    source = starting_point(config)
    return replace(config, model=source.model.config), source


def _tokenizer_file(config: Config, source: Start | None, workdir: Path) -> Path | None:
    """Returns the tokenizer that an adopted model comes with; None where the data say which one to use."""
    if not config.init.from_pretrained or config.data.tokenizer:
        return None
    if source is None:
        return workdir / checkpoint.TOKENIZER
    if source.tokenizer is None:
        raise InputError(
            f"{config.init.from_pretrained} has no {checkpoint.TOKENIZER}: save it there with the tokenizers or "
            "transformers library (a fast tokenizer's save_pretrained), or give --config.data.tokenizer"
        )
    return source.tokenizer


def _check_same_run(config: Config, workdir: Path) -> None:
    """Raises InputError if `workdir` holds a run with another config, or is or lies under a file."""
    present = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not present.is_dir():
        raise InputError(f"{present} is a file, expected a directory for the run")
    if not (workdir / checkpoint.CONFIG).exists():
        return
    changed = changed_options(checkpoint.read_config(workdir), config, MAY_CHANGE)
    if changed:
        raise InputError(
            f"{workdir} holds a run with other options ({'; '.join(changed)}); "
            "give them as they were to resume it, or another --workdir"
        )


def _check_same_data(config: Config, prepared: Prepared, workdir: Path) -> None:
    """Raises InputError if the text or the tokenizer is no longer what the run began with."""
    tokenizer, tokens = workdir / checkpoint.TOKENIZER, workdir / TOKENS
    if tokenizer.exists() and tokenizers.load(tokenizer).to_str() != prepared.tokenizer.to_str():
        what = f"config.data.tokenizer={config.data.tokenizer}" if config.data.tokenizer else "the text"
        raise InputError(
            f"{what} gives another tokenizer than {tokenizer}, with which this run began; "
            "restore it to resume, or give another --workdir to start a new run"
        )
    if tokens.exists() and tokens.read_text().strip() != prepared.digest:
        raise InputError(
            f"the text of corpus {config.data.corpus!r} has changed since the run in {workdir} began; "
            "restore it to resume, or give another --workdir to start a new run"
        )


def _check_batches(config: Config, prepared: Prepared) -> None:
    """Raises InputError for batches that cannot be made, while there is no workdir yet that would hold this config."""
    train_batches(prepared, config, process_count=jax.process_count())
    eval_batches(prepared, config)


def _open_workdir(config: Config, workdir: Path, prepared: Prepared) -> None:
    if jax.process_index() != 0:
        return
    try:
        (workdir / checkpoint.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_text(workdir / checkpoint.TOKENIZER, prepared.tokenizer.to_str())
        write_text(workdir / TOKENS, prepared.digest + "\n")
        checkpoint.save_config(workdir, config)
    except OSError as error:
        raise InputError(f"{workdir} cannot be written ({error}); give another --workdir") from error


def _restored(state: TrainState, checkpoints: Checkpoints) -> TrainState:
    step = checkpoints.latest()
    if step is None:
        return state
    params, optimizer = checkpoints.restore(step, state.params, state.optimizer)
    return TrainState(jax.device_put(jax.numpy.int32(step), state.step.sharding), params, optimizer)


def _introduce(
    log: Log, config: Config, state: TrainState, prepared: Prepared, start: int, summary: str | None
) -> None:
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    model = config.model
    log.print(
        f"{model.kind}, {size / 1e6:.2f} M parameters, width {model.width}, depth {model.depth}, "
        f"groups {model.groups}, on {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    log.print(f"{prepared.train_tokens:,} training tokens; depth steps drawn: {config.step_sampling.kind}")
    if start:
        log.print(f"resumed after update {start}")
    elif summary is not None:
        log.print(summary)

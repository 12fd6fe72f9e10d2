"""The loop: update, log, evaluate and save, until the last update or until it is asked to stop."""

import math
import time
from dataclasses import dataclass

import jax
import optax
from jax.sharding import Mesh

from odelm.checkpoint import Checkpoints
from odelm.config import Config
from odelm.errors import InputError
from odelm.interrupts import StopSignal
from odelm.train.draws import draw_grid
from odelm.train.evaluate import HeldOut
from odelm.train.log import Log, Window
from odelm.train.optimizer import schedule
from odelm.train.prefetch import Prefetch
from odelm.train.step import TrainState, Update, compile_updates

_norm = jax.jit(optax.tree.norm)


@dataclass(frozen=True)
class Result:
    """How a run ended: updates applied, the last held-out losses by step count, and the signal that interrupted it."""

    step: int
    losses: dict[int, float]
    signal: int = 0

    @property
    def interrupted(self) -> bool:
        return self.signal != 0


@dataclass(frozen=True)
class Loop:
    """What the loop calls at its cadence."""

    config: Config
    mesh: Mesh
    update: Update
    batches: Prefetch
    held_out: HeldOut
    checkpoints: Checkpoints
    log: Log

    def __call__(self, state: TrainState) -> Result:
        """Trains from `state`, which is donated, and returns how that ended."""
        start, updates = int(state.step), self.config.train.updates
        recorded = self.held_out.recorded(start)
        if start >= updates and recorded:
            self.log.print(f"already finished: {start} updates; raise --config.train.updates to continue")
            return Result(start, recorded)
        baseline, losses = self.held_out.baseline(start, state.params), {}
        stop = StopSignal()
        if start < updates:
            state, losses = self._train(state, stop)
        step = int(state.step)
        if stop.requested:
            self.log.print(f"interrupted after update {step}; run the same command to resume from there")
            return Result(step, losses, stop.requested)
        losses = self.held_out.evaluate(step, state.params)
        self.log.comparison(baseline, losses)
        return Result(step, losses)

    def _train(self, state: TrainState, stop: StopSignal) -> tuple[TrainState, dict[int, float]]:
        """Returns the state after the last update, or after the first one that `stop` lets finish, which is saved, and
        the last held-out losses on the way."""
        options, step = self.config.train, int(state.step)
        losses = self._missed_evaluation(state)
        batch = self.batches.next()
        compiled = compile_updates(self.update, state, batch, self.config.trained_counts, self.mesh, self.log.print)
        self.batches.waited()
        window = Window()
        # Before this there is nothing to lose, and a compilation is not worth waiting for.
        with stop:
            while step < options.updates and not stop.requested:
                grid = draw_grid(self.config, step)
                state, metrics = compiled[len(grid) - 1](state, batch, grid)
                step += 1
                window.add(metrics)
                batch = self.batches.next_after(metrics)
                if step % options.log_every == 0 or step == options.updates:
                    _check_finite(step, metrics["loss"], "loss")
                    _check_finite(step, metrics["gradient_norm"], "norm of the gradients")
                    self._record(step, window, len(grid) - 1)
                if step % options.eval_every == 0 and step < options.updates and not stop.requested:
                    paused = time.perf_counter()
                    losses = self.held_out.evaluate(step, state.params)
                    window.leave_out(time.perf_counter() - paused)
                if step % options.checkpoint_every == 0:
                    self._save(step, state)
            self._save(step, state)
        return state, losses

    def _save(self, step: int, state: TrainState) -> None:
        """Saves a state whose parameters are finite: one that is not would take the place of a good one."""
        _check_finite(step, _norm(state.params), "norm of the parameters")
        self.checkpoints.save(step, state.params, state.optimizer)

    def _missed_evaluation(self, state: TrainState) -> dict[int, float]:
        """Returns the held-out losses that were due when the run was interrupted, {} if none were."""
        step = int(state.step)
        if step == 0 or step % self.config.train.eval_every or self.held_out.recorded(step):
            return {}
        return self.held_out.evaluate(step, state.params)

    def _record(self, step: int, window: Window, steps: int) -> None:
        """Logs the updates since the last record; `steps` is the number of depth steps of the last one."""
        options = self.config.train
        tokens = options.batch_size * options.length
        rate = schedule(self.config.optimizer, options.updates)(step - 1)
        measured = window.close(tokens=tokens, waited=self.batches.waited())
        own = {"learning_rate": jax.numpy.asarray(rate).item(), "depth_steps": steps, "tokens": step * tokens}
        self.log.training(step, measured | own)


def _check_finite(step: int, value: jax.Array, name: str) -> None:
    if not math.isfinite(float(value)):
        raise InputError(
            f"the {name} is {float(value)} after update {step}: training has diverged, and nothing was saved since the "
            "last checkpoint. Lower --config.optimizer.learning_rate, in a new --workdir"
        )

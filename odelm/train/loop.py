"""The loop: update, log, evaluate and save, until the last update or until it is asked to stop."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh

from odelm.checkpoint import Checkpoints, Meta
from odelm.config import Config
from odelm.errors import EVERYWHERE, Diverged
from odelm.interrupts import StopSignal
from odelm.train.agreement import Agreement
from odelm.train.behaviour import Behaviour
from odelm.train.draws import draw_grid
from odelm.train.evaluate import HeldOut
from odelm.train.flops import cost_of, peak_flops, predicted_share, training_flops
from odelm.train.health import Losses, collapsed
from odelm.train.log import Log
from odelm.train.optimizer import schedule
from odelm.train.prefetch import MAX_IN_FLIGHT, Prefetch
from odelm.train.profile import Profile
from odelm.train.step import Metrics, TrainState, Update, compile_updates
from odelm.train.window import Window


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
    """The training loop, with everything that it calls at its cadence."""

    config: Config
    mesh: Mesh
    update: Update
    batches: Prefetch
    held_out: HeldOut
    checkpoints: Checkpoints
    log: Log
    unrecorded: Sequence[dict[str, float]]
    """The metrics of the updates since the last record, if the run starts from a checkpoint between two records."""
    read: int
    """How many tokens the run had read by the last record, without padding."""
    recent: Losses
    """The losses of the last records."""
    facts: Meta
    """The facts about the run that every checkpoint stores."""
    entropy: float
    """The entropy of token frequencies, in nats per token."""
    profile: Profile
    behaviour: Behaviour = field(default_factory=Behaviour)

    def __call__(self, state: TrainState) -> Result:
        """Trains from `state`, which is donated, and returns how the run ended."""
        start, updates = int(state.step), self.config.train.updates
        recorded = self.held_out.recorded(start)
        if start >= updates and recorded:
            self.log.print(f"already finished: {start} updates; raise --config.train.updates to continue")
            return Result(start, recorded)
        baseline, losses = self.held_out.baseline(start, state.evaluated), {}
        interrupted = 0
        if start < updates:
            state, losses, interrupted = self._train(state)
        step = int(state.step)
        if interrupted:
            self.log.print(f"interrupted after update {step}; run the same command to resume from there")
            return Result(step, losses, interrupted)
        losses = self._evaluate(step, state)
        self.checkpoints.retain()
        self.log.comparison(baseline, losses)
        if summary := self.behaviour.summary():
            self.log.print(summary)
        self.log.print(cost_of(self.config, step))
        return Result(step, losses)

    def _train(self, state: TrainState) -> tuple[TrainState, dict[int, float], int]:
        """Returns the state, which is saved, after the last update or after the update that a signal to any process
        lets finish; the last held-out losses on the way; and that signal, or 0."""
        options, step = self.config.train, int(state.step)
        losses = self._missed_evaluation(state)
        batch = self.batches.next()
        compiled = compile_updates(self.update, state, batch, self.config.trained_counts, self.mesh, self.log.print)
        self.batches.waited()
        window, unread = Window(self.unrecorded, self.read), deque[Metrics]()
        # Before this there is nothing to lose, and a compilation is not worth waiting for.
        with StopSignal() as stop:
            signal = Agreement(self.mesh, lambda: stop.requested)
            while step < options.updates and not signal.number:
                grid = draw_grid(self.config, step)
                state, metrics = compiled[len(grid) - 1](state, batch, grid)
                step += 1
                if traced := self.profile.after_update(metrics):
                    self.log.print(traced)
                window.add(metrics, len(grid) - 1)
                batch = self.batches.next_after(metrics)
                signal.tell()
                unread.append(metrics)
                if len(unread) > MAX_IN_FLIGHT:
                    # This update is finished, so reading its metrics does not delay those that are running.
                    self._check_skipped(unread.popleft())
                if step % options.log_every == 0 or step == options.updates:
                    self._record(step, window, len(grid) - 1)
                evaluated = {}
                if step % options.eval_every == 0 and step < options.updates and not signal.number:
                    paused = time.perf_counter()
                    losses = evaluated = self._evaluate(step, state)
                    window.leave_out(time.perf_counter() - paused)
                # Not while updates are being skipped: the run may be about to end, and is then examined from an earlier
                # state.
                if step % options.checkpoint_every == 0 and not int(state.skipped):
                    self._save(step, state, window, evaluated)
            if traced := self.profile.close():
                self.log.print(traced)
            for metrics in unread:
                self._check_skipped(metrics)
            if step >= options.updates and int(state.skipped) >= step:
                raise self._diverged(step)
            self._save(step, state, window, {})
            return state, losses, signal.close()

    def _save(self, step: int, state: TrainState, window: Window, losses: dict[int, float]) -> None:
        found: Meta = {
            "window": window.unrecorded(), "read": window.read, "recent": self.recent.kept(),
            "skipped": int(state.skipped),
        }  # fmt: skip
        if losses:
            found["eval_loss"] = {str(steps): loss for steps, loss in losses.items()}
        self.checkpoints.save(step, state.params, state.optimizer, self.facts | found, average=state.average)

    def _check_skipped(self, metrics: Metrics) -> None:
        """Raises Diverged if too many updates in a row were skipped."""
        if int(metrics["skipped"]) >= self.config.train.max_nonfinite:
            raise self._diverged(int(metrics["skipped"]))

    def _diverged(self, skipped: int) -> Diverged:
        self.checkpoints.wait()
        good = self.checkpoints.latest()
        kept = "there is no checkpoint yet" if good is None else f"the newest good checkpoint is {good}"
        diverged = Diverged(
            f"loss, gradients or parameters were non-finite in {skipped} updates in a row, all skipped: training has "
            f"diverged; {kept}. Lower --config.optimizer.learning_rate, in a new --workdir"
        )
        diverged.add_note(EVERYWHERE)  # All processes count the same.
        return diverged

    def _evaluate(self, step: int, state: TrainState) -> dict[int, float]:
        losses = self.held_out.evaluate(step, state.evaluated)
        if warning := collapsed(losses, self.entropy):
            self.log.print(f"update {step}: {warning}")
        return losses

    def _missed_evaluation(self, state: TrainState) -> dict[int, float]:
        """Returns the held-out losses that were due when the run was interrupted, {} if none were."""
        step = int(state.step)
        if step == 0 or step % self.config.train.eval_every or self.held_out.recorded(step):
            return {}
        return self._evaluate(step, state)

    def _record(self, step: int, window: Window, steps: int) -> None:
        """Logs the updates since the last record; `steps` is the number of depth steps of the last one."""
        options = self.config.train
        rate = schedule(self.config.optimizer, options.updates)(step - 1)
        measured = window.close(waited=self.batches.waited())
        if measured["mean_steps"] is not None and (peak := peak_flops()) is not None:
            needed = training_flops(
                self.config.model, steps=measured["mean_steps"], length=options.length,
                predicted=predicted_share(self.config),
            )  # fmt: skip
            measured["model_flops_utilisation"] = needed * measured["tokens_per_s"] / (peak * self.mesh.size)
        own = {"learning_rate": jax.numpy.asarray(rate).item(), "depth_steps": steps}
        self.log.training(step, measured | own)
        warning = self.recent.jumped(measured["loss"])
        if warning:
            self.log.print(f"update {step}: {warning}")
        self.behaviour.add(measured, updates=window.closed, tokens=window.closed_tokens, jumped=warning is not None)

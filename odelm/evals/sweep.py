"""Latency and held-out loss for each number of steps, against full depth."""

import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from odelm import ode
from odelm.compiling import side_by_side
from odelm.errors import InputError
from odelm.infer.latency import Latency, Name, measure
from odelm.infer.narrowing import make_leaving
from odelm.infer.prompts import some_tokens
from odelm.infer.runner import Runner, make_adaptive, make_forward
from odelm.models import stretches
from odelm.models.early_exit import EarlyExit, check_exits, counts_that_save
from odelm.models.exit_pass import encode_with_exits
from odelm.models.loss import Batch, LossSums, MeanLoss, inputs_of, mean_loss, sums_from_hidden
from odelm.models.transformer import DepthPlan

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One way to cross the depth: `steps` equal steps, steps of a grid, or steps chosen by a tolerance."""

    solver: str
    steps: int | None = None
    tolerance: float | None = None
    integrator: str = "scan"
    grid: tuple[float, ...] | None = None
    """The times over the core, (steps + 1,), if the steps are not equal."""
    early_exit: EarlyExit | None = None
    """When a row leaves those steps early."""

    def plan(self, runner: Runner) -> DepthPlan:
        """Returns the precomputed part of the integration; InputError for one that the model cannot take."""
        assert self.steps is not None, "a tolerance has no plan"
        return runner.plan(self.steps, self.solver, self.integrator, self.grid)


@dataclass(frozen=True)
class Measured:
    latency: Latency
    evaluations: float
    loss: MeanLoss | None
    before: MeanLoss | None = None
    """The loss of the model that this one was adapted from."""


def settings(
    runner: Runner,
    steps: Sequence[int],
    *,
    solver: str = "euler",
    tolerance: float | None = None,
    integrator: str = "scan",
    early_exits: Sequence[EarlyExit] = (),
) -> list[Setting]:
    """Returns what to measure, full depth first; InputError for steps or a solver that the model cannot take.

    `early_exits` are measured at full depth and at each of the steps where they can save some. With
    `integrator="diffrax"` each count is crossed by the scan and by Diffrax, or only by Diffrax if the scan does not
    support the solver.
    """
    full = Setting("euler", runner.model.config.core)
    integrators = [integrator] if integrator == "scan" or solver in ode.IMPLICIT_SOLVERS else ["scan", integrator]
    counts = sorted(set(steps), reverse=True)
    chosen = [Setting(solver, count, integrator=name) for count in counts for name in integrators]
    if tolerance is not None:
        explicit = solver not in ode.IMPLICIT_SOLVERS
        adaptive = solver if explicit and ode.has_error_estimate(ode.get_solver(solver)) else "bosh3"
        if not tolerance > 0:
            raise InputError(f"the adaptive tolerance is {tolerance}, expected a positive number such as 0.01")
        chosen.append(Setting(adaptive, tolerance=tolerance))
    for setting in chosen:
        if setting.steps is not None:
            plan = setting.plan(runner)
            for rule in early_exits:
                check_exits(runner.model, plan, rule)
    if early_exits:
        saving = counts_that_save(runner.model.config, [of.steps for of in [full, *chosen] if of.steps])
        bases = [of for of in dict.fromkeys([full, *chosen]) if of.steps in saving]
        chosen += [dataclasses.replace(of, early_exit=rule) for of in bases for rule in early_exits]
    return [full] + [setting for setting in chosen if setting != full]


def sweep(
    runner: Runner,
    chosen: Sequence[Setting],
    *,
    batch: int,
    length: int,
    held_out: Sequence[Batch],
    repeats: int = 30,
    before: Runner | None = None,
) -> list[Row]:
    """Returns a row for each setting; the first is the one that the others are compared with.

    Latency is that of one forward pass from tokens (batch, length) to all logits, with early exits on tokens of the
    held-out text, if there is one. `held_out` may be empty: then the losses are None. `before` is the model that this
    one was adapted from: rows then have `loss_before` too, None for step counts that it cannot take. Raises InputError
    for a tolerance that takes too many steps.
    """
    calls = make_calls(runner, chosen, batch=batch, length=length, held_out=held_out)
    with _within_budget():
        latencies = latencies_of(calls, repeats)
        measured = _measured(runner, chosen, calls, latencies, held_out, before)
    rows = [make_row(s, m, measured[0], batch, length) for s, m in zip(chosen, measured, strict=True)]
    if before is not None:
        for row, m in zip(rows, measured, strict=True):
            row["loss_before"] = None if m.before is None else m.before.loss
    return rows


def make_calls(
    runner: Runner, chosen: Sequence[Setting], *, batch: int, length: int, held_out: Sequence[Batch] = ()
) -> dict[Setting, Callable[[], Any]]:
    """Returns the forward pass of each setting on some tokens (batch, length), for `odelm.infer.latency.measure`."""
    tokens = jnp.asarray(some_tokens(held_out, runner.model.config, batch=batch, length=length), jnp.int32)
    forward, leaving = make_forward(runner.graph), make_leaving(runner.graph)
    calls = {}
    for setting in chosen:
        if setting.early_exit is not None:
            options = setting.plan(runner), setting.early_exit
            calls[setting] = lambda options=options: leaving(runner.params, *options, tokens)
        elif setting.steps is None:
            adaptive = make_adaptive(runner.graph, tolerance=_tolerance(setting), solver=setting.solver)
            calls[setting] = lambda adaptive=adaptive: adaptive(runner.params, tokens)
        else:
            plan = setting.plan(runner)
            calls[setting] = lambda plan=plan: forward(runner.params, plan, tokens)
    return calls


def loss_of(runner: Runner, setting: Setting, held_out: Sequence[Batch]) -> MeanLoss | None:
    """Returns the loss over the held-out batches; None if there are none."""
    return _quality(runner, setting, held_out)[0]


def timed(
    runner: Runner,
    losses: Mapping[Setting, MeanLoss],
    *,
    batch: int,
    length: int,
    repeats: int = 30,
) -> list[Row]:
    """Returns the rows of a sweep over settings with known losses and numbers of steps, full depth first."""
    chosen = list(losses)
    latencies = latencies_of(make_calls(runner, chosen, batch=batch, length=length), repeats)
    measured = [Measured(latencies[s], evaluations_of(runner, s), losses[s]) for s in chosen]
    return [make_row(s, m, measured[0], batch, length) for s, m in zip(chosen, measured, strict=True)]


def latencies_of(calls: Mapping[Name, Callable[[], Any]], repeats: int) -> dict[Name, Latency]:
    """Returns the latency of each call, timed in turns after all have been compiled."""
    # The first call of each compiles.
    side_by_side(lambda call: jax.block_until_ready(call()), calls.values())
    return measure(calls, repeats=repeats)


@contextlib.contextmanager
def _within_budget() -> Iterator[None]:
    """Turns an integration that ran out of steps, or of iterations, into an InputError.

    The error is raised inside a callback of compiled code, and JAX logs its traceback before it raises it again.
    """
    logger = logging.getLogger("jax")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if re.search(r"[Nn]onlinear solve", str(error)):
            raise InputError(
                "the implicit solver did not solve its equations at these step sizes: try more --steps"
            ) from error
        found = re.search(r"\d+ steps did not reach t1 at tolerance \S+", str(error))
        if found is None:
            raise
        raise InputError(f"{found[0].removesuffix(':')}: try a larger tolerance, such as 0.01") from error
    finally:
        logger.setLevel(level)


def _measured(
    runner: Runner,
    chosen: Sequence[Setting],
    calls: Mapping[Setting, Callable[[], Any]],
    latencies: Mapping[Setting, Latency],
    held_out: Sequence[Batch],
    before: Runner | None,
) -> list[Measured]:
    measured = []
    qualities = side_by_side(lambda setting: _quality(runner, setting, held_out), chosen)
    for setting, (loss, evaluations) in zip(chosen, qualities, strict=True):
        if setting.steps is not None and setting.early_exit is None:
            evaluations = evaluations_of(runner, setting)
        elif not held_out:
            evaluations = float(np.mean(calls[setting]()[1]))
        former = None if before is None or setting.early_exit else _as_before(runner, before, setting)
        past = None if before is None or former is None else _quality(before, former, held_out)[0]
        measured.append(Measured(latencies[setting], evaluations, loss, past))
    return measured


def _as_before(runner: Runner, before: Runner, setting: Setting) -> Setting | None:
    """Returns how the model that this one was adapted from makes as many evaluations, None if it cannot."""
    config, former = runner.model.config, before.model.config
    if (config.ends, config.core) != (former.ends, former.core):
        if setting.steps is None or setting.grid is not None or setting.solver != "euler":
            return None
        setting = dataclasses.replace(setting, steps=setting.steps + config.ends - former.ends)
    with contextlib.suppress(InputError):
        return setting if setting.steps is None or setting.plan(before) else None
    return None


def _tolerance(setting: Setting) -> float:
    assert setting.tolerance is not None
    return setting.tolerance


def evaluations_of(runner: Runner, setting: Setting) -> float:
    """Returns how often the blocks are applied; nan for an implicit solver, which iterates as often as it must."""
    if setting.solver in ode.IMPLICIT_SOLVERS:
        return math.nan
    return stretches.evaluations_of(setting.plan(runner))


def _quality(runner: Runner, setting: Setting, held_out: Sequence[Batch]) -> tuple[MeanLoss | None, float]:
    """Returns the loss over the held-out batches, and the mean evaluations of adaptive steps and of early exits."""
    if not held_out:
        return None, math.nan
    plan = None if setting.steps is None else setting.plan(runner)
    adaptive, rule = setting if plan is None else None, setting.early_exit
    results = [jax.device_get(_losses(runner.graph, adaptive, runner.params, plan, rule, data)) for data in held_out]
    # Rows of padding have no weight.
    rows = [(data["weights"].sum(axis=1) > 0).astype(float) for data in held_out]
    spent = sum(
        (np.broadcast_to(found, len(real)) * real).sum() for (_, found), real in zip(results, rows, strict=True)
    )
    return mean_loss(sums for sums, _ in results), float(spent / sum(real.sum() for real in rows))


@partial(jax.jit, static_argnums=(0, 1))
def _losses(
    graph: nnx.GraphDef, adaptive: Setting | None, params: Any, plan: Any, rule: EarlyExit | None, data: Batch
) -> tuple[LossSums, jax.Array]:
    model = nnx.merge(graph, params)
    hidden, evaluations = hidden_of(model, adaptive, plan, rule, data)
    return sums_from_hidden(model, hidden, data), evaluations


def hidden_of(
    model: Any, adaptive: Setting | None, plan: Any, rule: EarlyExit | None, data: Batch
) -> tuple[jax.Array, jax.Array]:
    """Returns the hidden states (B, L, D) of a batch, and the evaluations by a tolerance or with early exits."""
    if rule is not None:
        return encode_with_exits(model, inputs_of(data), plan, rule)
    if adaptive is None:
        return model.run(inputs_of(data), plan)[0], jnp.int32(0)
    return model.encode_adaptive(inputs_of(data), tolerance=_tolerance(adaptive), solver=adaptive.solver)


def make_row(setting: Setting, measured: Measured, full: Measured, batch: int, length: int) -> Row:
    """Returns the row of a setting, compared with `full`."""
    loss = None if measured.loss is None else measured.loss.loss
    return {
        "steps": setting.steps,
        "tolerance": setting.tolerance,
        "solver": setting.solver,
        "integrator": setting.integrator if setting.steps is not None else "diffrax",
        "evaluations": measured.evaluations,
        "batch": batch,
        "length": length,
        "latency_ms": {"median": measured.latency.median, "p90": measured.latency.p90},
        "tokens_per_s": batch * length / measured.latency.median * 1e3,
        "speedup": full.latency.median / measured.latency.median,
        "loss": loss,
        "loss_stderr": None if measured.loss is None else measured.loss.stderr,
        "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
        "loss_increase": None if loss is None or full.loss is None else loss / full.loss.loss - 1,
        "grid": None if setting.grid is None else list(setting.grid),
        "early_exit": None if setting.early_exit is None else setting.early_exit.tolerance,
        "exit_measure": None if setting.early_exit is None else setting.early_exit.measure,
        "chosen": False,
    }

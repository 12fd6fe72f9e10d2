"""The quality dial: the cheapest way to cross the depth that keeps a limit on the loss, with a confidence of 95 %.

Candidates are searched on one half of the held-out text. The other half, of other documents, tests the best of each
number of evaluations (`odelm.evals.confidence`). What is chosen is kept as an `odelm.profile.Profile`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from odelm import profile as profiles
from odelm.compiling import side_by_side
from odelm.config import Config, ModelConfig
from odelm.errors import InputError
from odelm.evals.candidates import (
    FEW_STEPS,
    SOLVERS,
    Times,
    crossing,
    equal_steps,
    evaluations_of,
    full_depth,
    is_cheaper,
    searched_grids,
    times_of,
    with_one_more,
)
from odelm.evals.compare import Comparison, Loaded, batch_size, held_out, length_of, publish, text_of
from odelm.evals.confidence import CONFIDENCE, Increase, in_test_order, increase_of, last_within
from odelm.evals.halves import Part, halves
from odelm.evals.report import make_report, percent
from odelm.evals.sweep import Row, Setting, timed
from odelm.infer.runner import Runner
from odelm.models.local_error import local_errors
from odelm.models.loss import Batch, inputs_of, mean_loss_of_rows, row_losses
from odelm.models.transformer import DepthPlan
from odelm.profile import PROFILE, Profile
from odelm.run_directory import TOKENIZER

EVAL_BATCHES = 32
"""Batches of 32 sequences, searched and tested together, unless a number is given."""
ERROR_BATCHES, SCREEN_BATCHES, FINALISTS = 2, 4, 2
"""Batches on which local errors are measured, and all candidates; and how many of these, for each number of
evaluations, are measured on all of the half."""
REPORT = "dial"
"""The name of the report's files, which are beside those of a comparison."""

Nats = dict[Setting, np.ndarray]
"""The nats of each row, float (rows,), by how the depth was crossed."""


@dataclass(frozen=True)
class Half:
    """Rows of text in batches of one shape."""

    batches: Sequence[Batch]
    tokens: np.ndarray
    """How many tokens each row predicts, float (rows,); padding is cut off."""
    part: Part

    @classmethod
    def of(cls, part: Part, length: int) -> "Half":
        batches = [jax.device_put(batch) for batch in part.rows.batches(batch_size(len(part.rows), length))]
        tokens = np.concatenate([np.asarray(batch["weights"]).sum(axis=1) for batch in batches])
        return cls(batches, tokens[: len(part.rows)], part)

    def first(self, count: int) -> "Half":
        """Returns the first batches of it."""
        batches = self.batches[:count]
        rows = sum(len(batch["weights"]) for batch in batches)
        part = dataclasses.replace(self.part, units=self.part.units[:rows])
        return Half(batches, self.tokens[:rows], part)

    def by_unit(self, nats: np.ndarray) -> np.ndarray:
        """Returns the sums over each unit, float (units,), of the nats of rows."""
        return np.bincount(self.part.units, weights=nats)


@dataclass(frozen=True)
class Choice:
    """What was seen on the half that was not searched."""

    nats: Nats
    """Of full depth, and of the best candidate for each number of evaluations, the most expensive first."""
    increases: Mapping[Setting, Increase]
    """Of each of them but full depth."""
    chosen: Setting | None
    """None if no candidate keeps the limit."""
    closest: Setting | None
    """The first to be tested if the limit were large, which loses least where it was searched; None if no candidate has a
    finite loss."""
    needed: float
    """The smallest limit at which the closest would have been chosen."""


def find_profile(
    loaded: Loaded, limit: float, options: Comparison, *, source: Path, step: int | None, out: Path | None = None
) -> Path:
    """Searches for the cheapest crossing that keeps the limit, prints its table, and returns the path of its profile.

    Args:
        loaded: as `odelm.load` returns it, from `source`.
        limit: the increase of the loss that is allowed, relative to full depth: 0.005 is half a per cent.
        options: the text, the length of its rows, and what is timed; its solver and integrator are not used.
        step: the run's checkpoint; None for a Hugging Face folder.
        out: the directory of profile and report; the source, and `infer` in it, if it is None.

    Raises InputError if no candidate keeps the limit and if there is no text, and has then written nothing; and if the
    files cannot be written.
    """
    model, config, _ = loaded
    if options.eval_batches is None:
        options = dataclasses.replace(options, eval_batches=EVAL_BATCHES)
    if config.model.core == config.model.groups:
        raise InputError(f"each of the model's {config.model.groups} blocks has a single step: there are no fewer")
    rows = held_out(loaded, options, tokenizer_file=None if step is None else source / TOKENIZER)
    length = length_of(config, options, run=step is not None)
    search, unseen = (Half.of(part, length) for part in halves(rows))
    runner = Runner.of(model)
    seen, candidates = search_on(runner, search)
    choice = choose(runner, seen, search, unseen, limit)
    if choice.chosen is None:
        raise InputError(_unreachable(config.model, choice, limit))
    text, searched = (_text(half, config, options) for half in (unseen, search))
    trained = (config.model.core,) if step is None else config.trained_counts
    report = make_report(
        config.model, _rows(runner, choice, unseen, options, length), step=step, text=text, trained=trained
    )
    report["dial"] = {
        "max_loss_increase": limit,
        "confidence": CONFIDENCE,
        "candidates": candidates,
        "searched": searched,
        "units": "documents" if unseen.part.documents else "rows",
    }
    publish(report, source / "infer" if out is None else out, name=REPORT)
    path = (source if out is None else out) / PROFILE
    profile = _profile(loaded, choice, limit, text, unseen.part.documents)
    profiles.write(profile, path)
    print(_told(profile))
    return path


def search_on(runner: Runner, half: Half) -> tuple[Nats, int]:
    """Returns the nats of full depth and of the best candidates, and how many candidates there were."""
    config, few = runner.model.config, half.first(SCREEN_BATCHES)
    full = full_depth(config)
    errors = _local_errors(runner, half.batches[:ERROR_BATCHES])
    chosen = list(dict.fromkeys([full, *equal_steps(config), *searched_grids(config, errors)]))
    print(f"searching on {int(half.tokens.sum()):,} tokens", flush=True)
    nats = losses_of(runner, chosen, few)

    def add(grids: Iterable[Times], solvers: Sequence[str]) -> None:
        more = dict.fromkeys(crossing(config, solver, grid) for solver in solvers for grid in grids)
        nats.update(losses_of(runner, [s for s in more if s not in nats and is_cheaper(config, s)], few))

    # Local errors only stand for the loss: what is good in few steps is also tried with one more.
    for steps in range(config.groups + FEW_STEPS - 1, config.core // 2):
        of_count = [setting for setting in nats if (setting.solver, setting.steps) == ("euler", steps)]
        best = min(of_count, key=lambda setting: nats[setting].sum(), default=None)
        add(() if best is None else with_one_more(config.core, times_of(config, best)), SOLVERS[:1])
    # And a grid that suits Euler's method is tried with the others.
    add([times_of(config, setting) for setting in _best(config, nats)], SOLVERS)
    return losses_of(runner, [full, *_best(config, nats, FINALISTS)], half), len(nats) - 1


def losses_of(runner: Runner, chosen: Sequence[Setting], half: Half) -> Nats:
    """Returns the nats of each row for each setting. A program is compiled for each number of steps and of stages, and
    takes the grid as an argument."""
    first = {(setting.solver, *(part.times.shape for part in setting.plan(runner))): setting for setting in chosen}
    side_by_side(lambda setting: _nats(runner, setting, half.batches[:1]), first.values())
    return {setting: _nats(runner, setting, half.batches)[: len(half.tokens)] for setting in chosen}


def choose(runner: Runner, seen: Nats, search: Half, unseen: Half, limit: float) -> Choice:
    """Returns the last candidate that keeps the limit, of the best for each number of evaluations.

    `seen` has the nats on the half that was searched.
    """
    config = runner.model.config
    full, best = full_depth(config), _best(config, seen)
    nats = losses_of(runner, [full, *best], unseen)
    if not np.isfinite(seen[full].sum() + nats[full].sum()):
        raise InputError("the loss at full depth is not finite, so that nothing can be compared with it: train again")

    def increase(half: Half, nats: Nats, setting: Setting) -> Increase:
        return increase_of(half.by_unit(nats[full]), half.by_unit(nats[setting]))

    searched = {setting: increase(search, seen, setting).value for setting in best}
    increases = {setting: increase(unseen, nats, setting) for setting in best}
    evaluations = [evaluations_of(config, setting) for setting in best]
    every = [best[number] for number in in_test_order(evaluations, list(searched.values()))]
    order = [setting for setting in every if searched[setting] <= limit]
    last = last_within([increases[setting].bound for setting in order], limit)
    needed = max(searched[every[0]], increases[every[0]].bound) if every else math.inf
    return Choice(nats, increases, None if last is None else order[last], every[0] if every else None, needed)


def _best(config: ModelConfig, nats: Nats, count: int = 1) -> list[Setting]:
    """Returns the candidates with the lowest losses, so many for each number of evaluations, the most evaluations
    first."""
    full, best = full_depth(config), {}
    finite = [setting for setting in nats if setting != full and np.isfinite(nats[setting].sum())]
    for setting in sorted(finite, key=lambda setting: nats[setting].sum()):
        best.setdefault(evaluations_of(config, setting), []).append(setting)
    return [setting for evaluations in sorted(best, reverse=True) for setting in best[evaluations][:count]]


def _local_errors(runner: Runner, batches: Iterable[Batch]) -> np.ndarray:
    """Returns the mean of the local errors over batches, float (C, C + 1)."""
    found = jax.jit(lambda params, data: local_errors(nnx.merge(runner.graph, params), inputs_of(data)))
    return np.mean([jax.device_get(found(runner.params, data)) for data in batches], axis=0, dtype=np.float64)


def _nats(runner: Runner, setting: Setting, batches: Iterable[Batch]) -> np.ndarray:
    plan = setting.plan(runner)
    found = [_row_losses(runner.graph, runner.params, plan, data) for data in batches]
    return np.concatenate([np.asarray(nats, np.float64) for nats, _ in jax.device_get(found)])


@partial(jax.jit, static_argnums=0)
def _row_losses(graph: nnx.GraphDef, params: Any, plan: DepthPlan, data: Batch) -> tuple[jax.Array, jax.Array]:
    return row_losses(nnx.merge(graph, params), data, plan=plan)


def _text(half: Half, config: Config, options: Comparison) -> dict[str, Any]:
    """Returns what is said of a half in the report."""
    text = text_of(half.part.rows, half.batches, config, options)
    return text | ({"documents": half.part.documents} if half.part.documents else {})


def _rows(runner: Runner, choice: Choice, half: Half, options: Comparison, length: int) -> list[Row]:
    """Returns the rows of the report: full depth, and the best for each number of evaluations."""
    real = half.tokens > 0
    losses = {
        setting: mean_loss_of_rows(nats[real], half.tokens[real].astype(np.float64))
        for setting, nats in choice.nats.items()
    }
    rows = timed(runner, losses, batch=options.batch, length=length, repeats=options.repeats)
    for setting, row in zip(losses, rows, strict=True):
        row["chosen"] = setting == choice.chosen
        row["loss_increase_bound"] = choice.increases[setting].bound if setting in choice.increases else None
    return rows


def _profile(loaded: Loaded, choice: Choice, limit: float, text: Mapping[str, Any], documents: int) -> Profile:
    model, chosen = loaded[0], choice.chosen
    assert chosen is not None
    found = choice.increases[chosen]
    return Profile(
        grid=times_of(model.config, chosen),
        solver=chosen.solver,
        evaluations=evaluations_of(model.config, chosen),
        max_loss_increase=limit,
        loss_increase=found.value,
        loss_increase_bound=found.bound,
        text=text["source"],
        tokens=text["tokens"],
        documents=documents,
        fingerprint=profiles.fingerprint_of(model),
    )


def _told(profile: Profile) -> str:
    """Returns what was chosen, in a sentence."""
    units = f"{profile.documents} documents not searched" if profile.documents else "rows not searched"
    return (
        f"chosen: {profile.steps} steps of {profile.solver}, {profile.evaluations} evaluations; on {units} "
        f"the loss changes by {profile.loss_increase:+.2%}, at 95 % confidence by at most "
        f"{profile.loss_increase_bound:+.2%}, of the {percent(profile.max_loss_increase)} allowed"
    )


def _unreachable(config: ModelConfig, choice: Choice, limit: float) -> str:
    """Returns what is told where no candidate keeps the limit."""
    if choice.closest is None:
        return "no way to cross the depth in fewer evaluations has a finite loss: the model needs its full depth"
    found, needed = choice.increases[choice.closest], choice.needed
    allow = f"allow --max_loss_increase={math.ceil(1e4 * needed) / 100:.6g}%, or " if needed < 1 else ""
    return (
        f"the tolerance is unreachable: no way to cross the depth in fewer than {config.depth} evaluations is known to "
        f"keep the loss within {percent(limit)} of full depth; the smallest increase found is {found.value:+.3%}, at "
        f"most {found.bound:+.3%} at 95 % confidence, with {evaluations_of(config, choice.closest)} evaluations: {allow}give "
        "more text (--text, --eval_batches)"
    )

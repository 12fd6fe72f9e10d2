"""The quality dial: the cheapest way to cross the depth that keeps a limit on the loss, with a confidence of 95 %.

Candidates are searched on one half of the held-out rows. The other half, which the search does not see, tests the best
of each number of evaluations (`odelm.evals.confidence`). What is chosen is kept as an `odelm.profile.Profile`.
"""

import dataclasses
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
from odelm.config import ModelConfig
from odelm.data.loader import HeldOutRows
from odelm.errors import InputError
from odelm.evals.candidates import SOLVERS, crossing, equal_steps, evaluations_of, full_depth, is_cheaper
from odelm.evals.candidates import searched_grids as searched
from odelm.evals.candidates import times_of
from odelm.evals.compare import Comparison, Loaded, batch_size, held_out, length_of, publish, text_of
from odelm.evals.confidence import CONFIDENCE, Ratio, increase_of, last_within, ratio_of, in_test_order
from odelm.evals.halves import halves
from odelm.evals.report import make_report, percent
from odelm.evals.sweep import Row, Setting, timed
from odelm.infer.runner import Runner
from odelm.models.local_error import local_errors
from odelm.models.loss import Batch, MeanLoss, inputs_of, row_losses
from odelm.models.transformer import DepthPlan
from odelm.profile import PROFILE, Profile
from odelm.run_directory import TOKENIZER

EVAL_BATCHES = 32
"""Batches of 32 sequences, searched and tested together, unless a number is given."""
ERROR_BATCHES = 2
"""Batches on which local errors are measured: they only propose grids."""
REPORT = "dial"
"""The name of the report's files, which are beside those of a comparison."""

Nats = dict[Setting, np.ndarray]
"""The nats of each row, float (rows,), by how the depth was crossed."""


@dataclass(frozen=True)
class Half:
    """Rows of text, in batches of one shape, and how many tokens each predicts, float (rows,)."""

    batches: Sequence[Batch]
    tokens: np.ndarray

    @classmethod
    def of(cls, rows: HeldOutRows, length: int) -> "Half":
        batches = [jax.device_put(batch) for batch in rows.batches(batch_size(len(rows), length))]
        return cls(batches, np.concatenate([np.asarray(batch["weights"]).sum(axis=1) for batch in batches]))


@dataclass(frozen=True)
class Choice:
    """What was seen on the half that was not searched."""

    nats: Nats
    """Of full depth, and of the best candidate for each number of evaluations, the most expensive first."""
    increases: Mapping[Setting, Ratio]
    chosen: Setting | None
    """None if no candidate keeps the limit."""


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

    Raises InputError if no candidate keeps the limit, if there is no text, and if the files cannot be written. Nothing is
    written then.
    """
    model, config, _ = loaded
    if options.eval_batches is None:
        options = dataclasses.replace(options, eval_batches=EVAL_BATCHES)
    rows = held_out(loaded, options, tokenizer_file=None if step is None else source / TOKENIZER)
    length, parts = length_of(config, options, run=step is not None), halves(rows)
    search, unseen = (Half.of(part, length) for part in parts)
    runner = Runner.of(model)
    seen = search_on(runner, search)
    choice = choose(config.model, seen, lambda settings: losses_of(runner, settings, unseen), limit)
    if choice.chosen is None:
        raise InputError(_unreachable(config.model, choice, limit))
    text = text_of(parts[1], unseen.batches, config, options)
    trained = (config.model.core,) if step is None else config.trained_counts
    report = make_report(
        config.model, _rows(runner, choice, unseen, options, length), step=step, text=text, trained=trained
    )
    report["dial"] = {
        "max_loss_increase": limit,
        "confidence": CONFIDENCE,
        "candidates": len(seen) - 1,
        "searched": text_of(parts[0], search.batches, config, options),
    }
    publish(report, source / "infer" if out is None else out, name=REPORT)
    path = (source if out is None else out) / PROFILE
    profiles.write(_profile(loaded, choice, limit, text), path)
    return path


def search_on(runner: Runner, half: Half) -> Nats:
    """Returns the nats of full depth and of every candidate."""
    config = runner.model.config
    if config.core == config.groups:
        raise InputError(f"the model's core is {config.core} steps of {config.groups} blocks: there are no fewer steps")
    errors = _local_errors(runner, half.batches[:ERROR_BATCHES])
    chosen = [full_depth(config), *equal_steps(config), *searched(config, errors)]
    print(f"searching {len(chosen) - 1} ways to cross the depth on {int(half.tokens.sum()):,} tokens")
    nats = losses_of(runner, chosen, half)
    # A grid that suits Euler's method is tried with the others too.
    grids = {times_of(config, setting) for setting in _best(config, nats)}
    more = [crossing(config, solver, grid) for solver in SOLVERS for grid in grids]
    return nats | losses_of(runner, [s for s in more if s not in nats and is_cheaper(config, s)], half)


def losses_of(runner: Runner, chosen: Sequence[Setting], half: Half) -> Nats:
    """Returns the nats of each row for each setting. A program is compiled for each number of steps and of stages, and
    takes the grid as an argument."""
    first = {(setting.solver, *(part.times.shape for part in setting.plan(runner))): setting for setting in chosen}
    side_by_side(lambda setting: _nats(runner, setting, half.batches[:1]), first.values())
    return {setting: _nats(runner, setting, half.batches)[half.tokens > 0] for setting in chosen}


def choose(config: ModelConfig, seen: Nats, measure: Any, limit: float) -> Choice:
    """Returns the last candidate that keeps the limit, of the best for each number of evaluations.

    Args:
        seen: the nats of full depth and of all candidates, where they were searched.
        measure: returns the nats of settings on the rows that were not searched.
    """
    full, best = full_depth(config), _best(config, seen)
    nats = measure([full, *best])
    increases = {setting: increase_of(nats[full], nats[setting]) for setting in best}
    searched = [increase_of(seen[full], seen[setting]).value for setting in best]
    order = in_test_order([evaluations_of(config, setting) for setting in best], searched, limit)
    last = last_within([increases[best[number]].bound for number in order], limit)
    return Choice(nats, increases, None if last is None else best[order[last]])


def _best(config: ModelConfig, nats: Nats) -> list[Setting]:
    """Returns the candidate with the lowest loss for each number of evaluations, the most evaluations first."""
    full = full_depth(config)
    finite = [setting for setting in nats if setting != full and np.isfinite(nats[setting].sum())]
    # Of two that lose the same the one that comes first stays.
    ordered = sorted(finite, key=lambda setting: nats[setting].sum(), reverse=True)
    best = {evaluations_of(config, setting): setting for setting in ordered}
    return [best[count] for count in sorted(best, reverse=True)]


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


def _rows(runner: Runner, choice: Choice, half: Half, options: Comparison, length: int) -> list[Row]:
    """Returns the rows of the report: full depth, and the best for each number of evaluations."""
    tokens = half.tokens[half.tokens > 0]
    losses = {
        setting: MeanLoss(found.value, found.stderr, int(tokens.sum()))
        for setting, found in ((setting, ratio_of(nats, tokens)) for setting, nats in choice.nats.items())
    }
    rows = timed(runner, losses, batch=options.batch, length=length, repeats=options.repeats)
    for setting, row in zip(losses, rows, strict=True):
        row["chosen"] = setting == choice.chosen
        row["loss_increase_bound"] = choice.increases[setting].bound if setting in choice.increases else None
    return rows


def _profile(loaded: Loaded, choice: Choice, limit: float, text: Mapping[str, Any]) -> Profile:
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
        fingerprint=profiles.fingerprint_of(model),
    )


def _unreachable(config: ModelConfig, choice: Choice, limit: float) -> str:
    """Returns what is told where no candidate keeps the limit."""
    if not choice.increases:
        return "no way to cross the depth in fewer evaluations has a finite loss: the model needs its full depth"
    setting, found = min(choice.increases.items(), key=lambda item: item[1].bound)
    return (
        f"no way to cross the depth in fewer than {config.depth} evaluations keeps the loss within {percent(limit)} of "
        f"full depth: the smallest increase found is {found.value:+.3%}, at most {found.bound:+.3%} at 95 % confidence, "
        f"with {evaluations_of(config, setting)} evaluations; allow --max_loss_increase={100 * found.bound:.2g}% or "
        "more, or give more text (--eval_batches)"
    )

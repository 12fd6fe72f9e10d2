"""Searches one half of a text for cheap ways to cross the depth, and chooses one of them by the other half."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from odelm.config import ModelConfig
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
from odelm.evals.confidence import Increase, in_test_order, increase_of, last_within
from odelm.evals.row_nats import Half, Nats, errors_of, losses_of
from odelm.evals.sweep import Setting
from odelm.infer.runner import Runner

ERROR_BATCHES, SCREEN_BATCHES, FINALISTS = 2, 4, 2
"""Batches on which local errors are measured; batches on which all candidates are measured; and how many candidates,
for each number of evaluations, are then measured on the whole half."""


@dataclass(frozen=True)
class Choice:
    """The results on the half that was not searched."""

    nats: Nats
    """The nats of full depth, and of the best candidate for each number of evaluations, the most expensive first."""
    increases: Mapping[Setting, Increase]
    """The increase of each of them except full depth."""
    chosen: Setting | None
    """None if no candidate keeps the limit."""
    closest: Setting | None
    """The candidate that loses least on the half that was searched, and is tested first; None if no loss is finite."""
    needed: float
    """The smallest limit at which the closest would have been chosen."""


def search_on(runner: Runner, half: Half) -> tuple[Nats, int]:
    """Returns the nats of full depth and of the best candidates, and how many candidates there were."""
    config, few = runner.model.config, half.first(SCREEN_BATCHES)
    full = full_depth(config)
    errors = errors_of(runner, half.batches[:ERROR_BATCHES])
    chosen = list(dict.fromkeys([full, *equal_steps(config), *searched_grids(config, errors)]))
    print(f"searching on {int(half.tokens.sum()):,} tokens", flush=True)
    nats = losses_of(runner, chosen, few)

    def add(grids: Iterable[Times], solvers: Sequence[str]) -> None:
        more = dict.fromkeys(crossing(config, solver, grid) for solver in solvers for grid in grids)
        nats.update(losses_of(runner, [s for s in more if s not in nats and is_cheaper(config, s)], few))

    # Local errors only approximate the loss: a grid that is good in few steps is also tried with one more.
    for steps in range(config.groups + FEW_STEPS - 1, config.core // 2):
        of_count = [setting for setting in nats if (setting.solver, setting.steps) == ("euler", steps)]
        best = min(of_count, key=lambda setting: nats[setting].sum(), default=None)
        add(() if best is None else with_one_more(config.core, times_of(config, best)), SOLVERS[:1])
    # And a grid that suits Euler's method is also tried with the other solvers.
    add([times_of(config, setting) for setting in _best(config, nats)], SOLVERS)
    return losses_of(runner, [full, *_best(config, nats, FINALISTS)], half), len(nats) - 1


def choose(runner: Runner, seen: Nats, search: Half, unseen: Half, limit: float) -> Choice:
    """Tests the best candidate for each number of evaluations, and chooses the last one that keeps the limit.

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
    """Returns the candidates with the lowest losses, `count` for each number of evaluations, the most evaluations
    first."""
    full, best = full_depth(config), {}
    finite = [setting for setting in nats if setting != full and np.isfinite(nats[setting].sum())]
    for setting in sorted(finite, key=lambda setting: nats[setting].sum()):
        best.setdefault(evaluations_of(config, setting), []).append(setting)
    return [setting for evaluations in sorted(best, reverse=True) for setting in best[evaluations][:count]]

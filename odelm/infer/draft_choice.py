"""Which coarse steps draft, and how many tokens: tried on the user's own prompts, the fastest taken.

The grid of each number of steps is chosen by acceptance, the tokens that a pass at full depth gives: grids of as many
steps cost the same and share a compiled program. Which number of steps and which length is fastest also depends on what
a draft costs, so these are timed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from odelm import ode
from odelm.config import default_steps
from odelm.errors import InputError
from odelm.infer.drafts import DraftCounts, Drafting, make_drafting
from odelm.infer.generator import Generator
from odelm.infer.latency import measure
from odelm.infer.prompts import Prompts

LENGTHS = ((3, 0.0), (6, 0.0), (8, 0.2))
"""Of drafts, each with the confidence below which one ends: long ones only where they go on being sure."""
MOST_GRIDS = 24
"""Grids of one number of steps of which the acceptance is measured."""

Grid = tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """How fast one way of drafting was, on the prompts that it was tried on."""

    grid: Grid | None
    """The times that a draft visits, (steps + 1,); None is no draft."""
    drafting: Drafting | None
    milliseconds: float
    """Of one continuation of all prompts; the median."""
    counts: DraftCounts | None


def with_fastest_drafts(generator: Generator, prompts: Prompts, **options: Any) -> Generator:
    """Returns a generator of the same text, with the drafts that are fastest on these prompts; the given one if it is
    fastest without. Takes the arguments of `try_drafts` and raises what that does."""
    best = try_drafts(generator, prompts, **options)[0]
    return generator if best.drafting is None else _drafting_with(generator, best.drafting)


def try_drafts(
    generator: Generator,
    prompts: Prompts,
    *,
    steps: Sequence[int] | None = None,
    new_tokens: int = 48,
    repeats: int = 3,
    **sampling: Any,
) -> list[Trial]:
    """Returns the trials of ways of drafting for a generator without drafts, the fastest first, taking turns.

    Args:
        steps: counts of coarse steps to try; the model's default ones by default. Those whose steps are not fewer than
            the generator's are left out.
        new_tokens: how many tokens each trial adds to each prompt; of too few for a draft there is only the trial of
            none.
        sampling: as in `Generator.stream`: fewer drafts are accepted at a higher temperature.

    Raises InputError for a generator that cannot draft: with two grids, with early exits, or with drafts already.
    """
    if generator.drafting is not None or generator.prefill_plan is not None or generator.early_exit is not None:
        raise InputError("drafts are tried for a generator of one grid, without drafts and early exits")
    options = dict(new_tokens=new_tokens) | sampling
    generators: list[tuple[Grid | None, Generator]] = [(None, generator)]
    for grid in _chosen_grids(generator, prompts, steps, options) if new_tokens > LENGTHS[0][0] else ():
        coarse = generator.runner.model.plan(grid=grid)
        generators += [(grid, _drafting_with(generator, make_drafting(coarse, *length))) for length in LENGTHS]
    calls = {i: lambda one=one: one(prompts, **options) for i, (_, one) in enumerate(generators)}
    latencies = measure(calls, repeats=repeats, warmup=1)
    trials = [
        Trial(grid, one.drafting, latencies[i].median, one.draft_counts) for i, (grid, one) in enumerate(generators)
    ]
    return sorted(trials, key=lambda trial: trial.milliseconds)


def _drafting_with(generator: Generator, drafting: Drafting) -> Generator:
    other = Generator.of(generator.runner, generator.tokenizer, generator.plan, drafting=drafting)
    other.end = generator.end
    return other


def _chosen_grids(
    generator: Generator, prompts: Prompts, steps: Sequence[int] | None, options: dict[str, Any]
) -> Iterator[Grid]:
    """Yields for each number of steps the grid whose drafts are accepted most."""
    model = generator.runner.model
    evaluations = sum(part.evaluations for part in generator.plan)

    def tokens_a_pass(grid: Grid) -> float:
        one = _drafting_with(generator, make_drafting(model.plan(grid=grid), *LENGTHS[-1]))
        one(prompts, **options)
        assert one.draft_counts is not None
        return one.draft_counts.tokens_per_round

    for count in default_steps(model.config) if steps is None else steps:
        equal = tuple(ode.grid.equal(model.config.core, count).tolist())
        if sum(part.evaluations for part in model.plan(grid=equal)) < evaluations:
            fixed = ode.grid.boundaries(model.config.core, model.config.groups).tolist()
            yield best_grid(equal, fixed, tokens_a_pass)


def best_grid(start: Grid, fixed: Sequence[float], score: Callable[[Grid], float]) -> Grid:
    """Returns the grid with the highest score found by moving one time by whole units of depth, repeatedly.

    `start` is kept where nothing is better, `fixed` times stay, and at most `MOST_GRIDS` grids are tried.
    """
    scores = {start: score(start)}
    best, before = start, None
    while best != before:
        before = best
        for grid in _neighbours(best, fixed):
            if grid not in scores and len(scores) < MOST_GRIDS:
                scores[grid] = score(grid)
        best = max(scores, key=lambda grid: scores[grid])
    return best


def _neighbours(grid: Grid, fixed: Sequence[float]) -> Iterator[Grid]:
    """Yields the grids in which one time has moved between the two beside it, the nearest moves first."""
    moves = []
    for i in range(1, len(grid) - 1):
        reach = math.ceil(grid[i + 1] - grid[i - 1])
        for by in range(-reach, reach + 1) if grid[i] not in fixed else ():
            if by and grid[i - 1] < grid[i] + by < grid[i + 1]:
                moves.append((abs(by), (*grid[:i], grid[i] + by, *grid[i + 1 :])))
    yield from (grid for _, grid in sorted(moves))


def describe(trials: Sequence[Trial]) -> str:
    """Returns one line about the fastest of the trials, against no draft."""
    best, plain = trials[0], next(trial for trial in trials if trial.grid is None)
    if best.grid is None or best.drafting is None or best.counts is None:
        return "no draft was faster on this prompt"
    times = " ".join(f"{time:g}" for time in best.grid)
    return (
        f"drafts of up to {best.drafting.length} tokens in {len(best.grid) - 1} steps (at {times}): "
        f"{best.counts.tokens_per_round:.1f} tokens a pass at full depth, "
        f"{plain.milliseconds / best.milliseconds:.2f}x as fast as without"
    )

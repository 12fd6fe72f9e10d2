"""Chooses the coarse steps that draft and the draft length: the fastest of those tried on the user's own prompts.

For each number of steps, the grid is chosen by acceptance, the number of tokens that a pass at full depth gives: grids
with equally many steps cost the same and share a compiled program. The fastest number of steps and the fastest length
also depend on the cost of a draft, so these are timed.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from odelm import ode
from odelm.arguments import of_class, whole
from odelm.config import default_steps
from odelm.errors import InputError
from odelm.infer.drafts import DraftCounts, Drafting, make_drafting
from odelm.infer.generator import NO_END, Generator
from odelm.infer.latency import measure
from odelm.infer.prompts import Prompts, list_of

LENGTHS = ((3, 0.0), (6, 0.0), (8, 0.2))
"""Draft lengths, each with the confidence below which a draft ends: long drafts only continue while they are
confident."""
MOST_GRIDS = 24
"""The most grids whose acceptance is measured for one number of steps."""

Grid = tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """How fast one way of drafting was, on the prompts that it was tried on."""

    grid: Grid | None
    """The times that a draft visits, (steps + 1,); None is no draft."""
    drafting: Drafting | None
    milliseconds: float
    """The median time of one continuation of all prompts."""
    counts: DraftCounts | None


def with_fastest_drafts(generator: Generator, prompts: Prompts, **options: Any) -> Generator:
    """Returns a generator of the same text, with the drafts that are fastest on these prompts, or the given generator
    if no draft is faster. Takes the arguments of `try_drafts` and raises the same errors."""
    best = try_drafts(generator, prompts, **options)[0]
    return generator if best.drafting is None else _drafting_with(generator, best.drafting, end=generator.end)


def try_drafts(
    generator: Generator,
    prompts: Prompts,
    *,
    steps: int | Sequence[int] | None = None,
    new_tokens: int = 48,
    repeats: int = 3,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> list[Trial]:
    """Times ways of drafting, in turns, for a generator without drafts; returns the trials, the fastest first.

    Args:
        steps: counts of coarse steps to try, or one; the model's default ones by default. Counts that take no fewer
            evaluations than the generator are left out.
        new_tokens: how many tokens each trial adds to each prompt, end tokens or not, so that all do the same work.
            With too few for a draft there is only the trial without one.
        repeats: timed calls of each way.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: as in `Generator.stream`; at a higher temperature
            fewer drafts are accepted.

    Raises InputError for a generator that cannot draft: with two grids, with early exits, with a window, with drafts
    already, or with a kernel that was asked for by name.
    """
    _check_drafts_can_be_tried(generator)
    new_tokens, repeats = whole("new_tokens", new_tokens), whole("repeats", repeats)
    prompts = list_of("prompt", prompts)
    counts = default_steps(generator.runner.model.config) if steps is None else steps
    counts = [counts] if isinstance(counts, int) else list(counts)
    options: dict[str, Any] = dict(
        new_tokens=new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    lengths = _lengths(new_tokens, generator.runner.model.config.max_length)
    plain = copy.copy(generator)
    plain.end = NO_END
    generators: list[tuple[Grid | None, Generator]] = [(None, plain)]
    for grid in _chosen_grids(generator, prompts, counts, lengths[-1], options) if lengths else ():
        coarse = generator.runner.model.plan(grid=grid)
        generators += [(grid, _drafting_with(generator, make_drafting(coarse, *length))) for length in lengths]
    calls = {i: lambda one=one: one(prompts, **options) for i, (_, one) in enumerate(generators)}
    latencies = measure(calls, repeats=repeats, warmup=1)
    trials = [
        Trial(grid, one.drafting, latencies[i].median, one.draft_counts) for i, (grid, one) in enumerate(generators)
    ]
    return sorted(trials, key=lambda trial: trial.milliseconds)


def _check_drafts_can_be_tried(generator: Any) -> None:
    of_class("generator", generator, Generator, "an odelm.Generator")
    others = (generator.drafting, generator.prefill_plan, generator.early_exit, generator.window)
    if any(other is not None for other in others):
        raise InputError("drafts are tried for a generator of one grid, without drafts, early exits and a window")


def _lengths(new_tokens: int, limit: int) -> list[tuple[int, float]]:
    """Returns the lengths and confidences to try: none for too few new tokens, none beyond the model's positions."""
    return [one for one in LENGTHS if new_tokens > LENGTHS[0][0] and one[0] < limit]


def _drafting_with(generator: Generator, drafting: Drafting, *, end: int = NO_END) -> Generator:
    of_both = generator.runner, generator.tokenizer, generator.plan
    other = Generator.of(*of_both, drafting=drafting, kernel=generator.kernels.asked)
    other.end = end
    return other


def _chosen_grids(
    generator: Generator,
    prompts: Prompts,
    counts: Sequence[int],
    length: tuple[int, float],
    options: dict[str, Any],
) -> Iterator[Grid]:
    """Yields, for each number of steps, the grid whose drafts, of one length and confidence, are accepted most."""
    model = generator.runner.model
    evaluations = sum(part.evaluations for part in generator.plan)

    def tokens_a_pass(grid: Grid) -> float:
        one = _drafting_with(generator, make_drafting(model.plan(grid=grid), *length))
        one(prompts, **options)
        assert one.draft_counts is not None
        return one.draft_counts.tokens_per_round

    for count in counts:
        equal = tuple(ode.grid.equal(model.config.core, count).tolist())
        if sum(part.evaluations for part in model.plan(grid=equal)) < evaluations:
            fixed = ode.grid.boundaries(model.config.core, model.config.groups).tolist()
            yield best_grid(equal, fixed, tokens_a_pass)


def best_grid(start: Grid, fixed: Sequence[float], score: Callable[[Grid], float]) -> Grid:
    """Returns the grid with the highest score, found by repeatedly moving one time by whole units of depth.

    `start` is returned if no grid is better, `fixed` times are not moved, and at most `MOST_GRIDS` grids are tried.
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
    """Yields the grids in which one time is moved but stays between its two neighbours, the smallest moves first."""
    moves = []
    for i in range(1, len(grid) - 1):
        reach = math.ceil(grid[i + 1] - grid[i - 1])
        for by in range(-reach, reach + 1) if grid[i] not in fixed else ():
            if by and grid[i - 1] < grid[i] + by < grid[i + 1]:
                moves.append((abs(by), (*grid[:i], grid[i] + by, *grid[i + 1 :])))
    yield from (grid for _, grid in sorted(moves))


def describe(trials: Sequence[Trial]) -> str:
    """Returns one line that compares the fastest trial with decoding without drafts."""
    best, plain = trials[0], next(trial for trial in trials if trial.grid is None)
    if best.grid is None or best.drafting is None or best.counts is None:
        return "no draft was faster on this prompt"
    times = " ".join(f"{time:g}" for time in best.grid)
    return (
        f"drafts of up to {best.drafting.length} tokens in {len(best.grid) - 1} steps (at {times}): "
        f"{best.counts.tokens_per_round:.1f} tokens a pass at full depth, "
        f"{plain.milliseconds / best.milliseconds:.2f}x as fast as without"
    )

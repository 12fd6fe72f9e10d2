"""Which steps draft, and how many tokens: tried on the user's own prompts, the fastest taken."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tokenizers import Tokenizer

from odelm.config import default_steps
from odelm.infer.drafts import DraftCounts, Drafting, make_drafting
from odelm.infer.generator import Generator
from odelm.infer.latency import measure
from odelm.infer.prompts import Prompts
from odelm.infer.runner import Runner
from odelm.models.transformer import DepthPlan

LENGTHS = ((3, 0.0), (6, 0.0), (8, 0.2))
"""Of drafts, each with the confidence below which one ends: long ones only where they go on being sure."""


@dataclass(frozen=True)
class Trial:
    """How fast one way of drafting was, on the prompts that it was tried on."""

    steps: int | None
    """None is no draft."""
    drafting: Drafting | None
    milliseconds: float
    """Of one continuation of all prompts; the median."""
    counts: DraftCounts | None


def try_drafts(
    runner: Runner,
    tokenizer: Tokenizer | None,
    plan: DepthPlan,
    prompts: Prompts,
    *,
    steps: Sequence[int] | None = None,
    new_tokens: int = 48,
    repeats: int = 3,
    end_token: str = "",
) -> list[Trial]:
    """Returns the trials of all ways of drafting for a plan, the fastest first; greedy text, the ways taking turns.

    Args:
        steps: counts of coarse steps to try; the model's default ones by default. Those whose steps are not fewer than
            the plan's are left out.
        new_tokens: how many tokens each trial adds to each prompt; of too few for a draft there is only the trial of
            none.
        end_token: as in `Generator`.
    """
    evaluations = sum(part.evaluations for part in plan)
    make = partial(Generator.of, runner, tokenizer, plan, end_token=end_token)
    generators: dict[int, tuple[int | None, Generator]] = {0: (None, make())}
    counts = default_steps(runner.model.config) if steps is None else steps
    for count in counts if new_tokens > LENGTHS[0][0] else ():
        coarse = runner.plan(count, "euler")
        if sum(part.evaluations for part in coarse) < evaluations:
            for length, confidence in LENGTHS:
                drafting = make_drafting(coarse, length, confidence)
                generators[len(generators)] = count, make(drafting=drafting)
    calls = {
        name: lambda generator=generator: generator(prompts, new_tokens=new_tokens)
        for name, (_, generator) in generators.items()
    }
    latencies = measure(calls, repeats=repeats, warmup=1)
    trials = [
        Trial(count, generator.drafting, latencies[name].median, generator.draft_counts)
        for name, (count, generator) in generators.items()
    ]
    return sorted(trials, key=lambda trial: trial.milliseconds)


def describe(trials: Sequence[Trial]) -> str:
    """Returns one line about the fastest of the trials, against no draft."""
    best, plain = trials[0], next(trial for trial in trials if trial.steps is None)
    if best.drafting is None or best.counts is None:
        return "no draft was faster on this prompt"
    return (
        f"drafts of up to {best.drafting.length} tokens in {best.steps} steps: {best.counts.tokens_per_round:.1f} "
        f"tokens a pass at full depth, {plain.milliseconds / best.milliseconds:.2f}x as fast as without"
    )

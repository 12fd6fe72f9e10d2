"""Drafts chosen on prompts: the grid by acceptance, its length and number of steps by time."""

import pytest
from flax import nnx

import odelm
from odelm.errors import InputError
from odelm.infer import draft_choice
from odelm.infer.draft_choice import LENGTHS, MOST_GRIDS, best_grid, describe, try_drafts, with_fastest_drafts
from odelm.infer.generator import Generator
from odelm.infer.latency import Latency

PROMPTS = [[3, 1, 4], [5, 9, 2]]


@pytest.fixture(scope="module")
def generator(make_config, randomise) -> Generator:
    """Returns a generator whose coarse steps agree with full depth at some places and at others not."""
    config = make_config(dtype="float32", tie_readout=False, max_length=32)
    return Generator(randomise(odelm.create(config, rngs=nnx.Rngs(0)), scale=0.6))


def near(target):
    return lambda grid: -sum(abs(a - b) for a, b in zip(grid, target, strict=True))


def test_a_grid_is_moved_to_the_highest_score():
    assert best_grid((0, 4, 8, 12), [0, 12], near((0, 2, 7, 12))) == (0, 2, 7, 12)
    # A boundary between groups stays, and times stay in order.
    assert best_grid((0, 3, 6, 9, 12), [0, 6, 12], near((0, 5, 5, 7, 12))) == (0, 5, 6, 7, 12)


def test_equal_steps_are_kept_where_nothing_is_better():
    assert best_grid((0, 4, 8, 12), [0, 12], lambda grid: 1.0) == (0, 4, 8, 12)


def test_no_more_grids_are_tried_than_are_worth_it():
    tried = []
    best_grid((0, 50, 100), [0, 100], lambda grid: tried.append(grid) or grid[1])
    assert len(tried) == len(set(tried)) == MOST_GRIDS


@pytest.mark.parametrize("fastest", [0, 2])
def test_the_fastest_drafts_are_taken(fastest, generator, monkeypatch):
    """The times are made up: of four ways, no draft first."""

    def measured(calls, **options):
        for call in calls.values():
            call()
        return {name: Latency(1.0 if name == fastest else 2.0 + name, 9.0) for name in calls}

    monkeypatch.setattr(draft_choice, "measure", measured)
    trials = try_drafts(generator, PROMPTS, steps=[4, 2], new_tokens=6)
    assert len(trials) == 1 + len(LENGTHS) and trials[0].milliseconds == 1
    chosen = with_fastest_drafts(generator, PROMPTS, steps=[4, 2], new_tokens=6)
    if fastest:
        length, _ = LENGTHS[1]
        assert trials[0].drafting.length == chosen.drafting.length == length and len(trials[0].grid) == 3
        assert "2.00x as fast" in describe(trials) and f"{length} tokens in 2 steps (at 0 " in describe(trials)
        assert chosen(PROMPTS, new_tokens=12) == generator(PROMPTS, new_tokens=12)
    else:
        assert trials[0].drafting is None and "no draft was faster" in describe(trials)
        assert chosen is generator


def test_the_grid_that_is_tried_is_accepted_at_least_as_often_as_equal_steps(generator):
    trials = try_drafts(generator, PROMPTS, steps=[2], new_tokens=24, repeats=1)
    grid = next(trial.grid for trial in trials if trial.grid)
    assert len(grid) == 3 and grid[0] == 0 and grid[-1] == 4
    counts = {}
    for name, times in (("equal", [0, 2, 4]), ("chosen", grid)):
        length, confidence = LENGTHS[-1]
        one = Generator(generator.runner.model, draft_grid=times, draft_length=length, draft_confidence=confidence)
        one(PROMPTS, new_tokens=24)
        counts[name] = one.draft_counts.tokens_per_round
    assert counts["chosen"] >= counts["equal"]


def test_sampled_text_has_its_own_trials(generator):
    """Drafts of a text at a high temperature are accepted less often than those of the likeliest tokens."""
    options = dict(steps=[2], new_tokens=24, repeats=1)
    greedy, sampled = (
        max(
            trial.counts.tokens_per_round
            for trial in try_drafts(generator, PROMPTS, **options, **drawn)
            if trial.counts
        )
        for drawn in ({}, dict(temperature=2.0))
    )
    assert greedy != sampled


def test_texts_that_end_early_are_not_faster(generator, monkeypatch):
    """Every trial adds as many tokens, whatever is drawn; what is chosen still ends its texts."""
    lengths = {}

    def measured(calls, **options):
        lengths.update({name: [len(text) for text in call()] for name, call in calls.items()})
        return {name: Latency(float(len(calls) - name), 9.0) for name in calls}

    ending = Generator.of(generator.runner, None, generator.plan)
    ending.end = ending(PROMPTS, new_tokens=1)[0][0]
    assert ending(PROMPTS, new_tokens=16)[0] == []
    monkeypatch.setattr(draft_choice, "measure", measured)
    chosen = with_fastest_drafts(ending, PROMPTS, steps=2, new_tokens=16)
    assert lengths == {name: [16] * len(PROMPTS) for name in range(1 + len(LENGTHS))}
    assert chosen.drafting is not None and chosen.end == ending.end
    assert chosen(PROMPTS, new_tokens=16) == ending(PROMPTS, new_tokens=16)


def test_drafts_that_a_short_model_has_no_room_for_are_left_out(make_config):
    short = Generator(odelm.create(make_config(max_length=8), rngs=nnx.Rngs(0)))
    trials = try_drafts(short, [[1]], steps=2, new_tokens=5, repeats=1)
    assert sorted(trial.drafting.length for trial in trials if trial.drafting) == [3, 6]


@pytest.mark.parametrize(
    "options, words", [(dict(repeats=0), "repeats is 0"), (dict(new_tokens="x"), "new_tokens is 'x'")]
)
def test_mistakes_are_told(options, words, generator):
    with pytest.raises(InputError, match=words):
        try_drafts(generator, PROMPTS, **options)


def test_what_is_no_generator_is_told():
    with pytest.raises(InputError, match="generator is None, expected an odelm.Generator"):
        with_fastest_drafts(None, PROMPTS)


def test_prompts_may_come_one_by_one(generator):
    assert len(try_drafts(generator, iter(PROMPTS), steps=1, new_tokens=1, repeats=1)) == 1


def test_the_kernel_that_was_asked_for_is_kept(generator, monkeypatch):
    monkeypatch.setattr(draft_choice, "measure", lambda calls, **options: {i: Latency(9.0 - i, 9.0) for i in calls})
    chosen = with_fastest_drafts(Generator(generator.runner.model, kernel="xla"), PROMPTS, steps=2, new_tokens=6)
    assert chosen.drafting is not None and chosen.kernels.asked == "xla"
    with pytest.raises(InputError, match="kernel 'persistent' takes no drafts"):
        try_drafts(Generator(generator.runner.model, kernel="persistent"), PROMPTS, steps=2, new_tokens=6)


@pytest.mark.parametrize("options", [dict(draft_steps=2), dict(prefill_steps=2), dict(early_exit=odelm.EarlyExit(0.1))])
def test_a_generator_that_cannot_draft_is_refused(options, generator):
    with pytest.raises(InputError, match="of one grid, without drafts, early exits and"):
        try_drafts(Generator(generator.runner.model, **options), PROMPTS)

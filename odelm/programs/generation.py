"""What `infer.py` does with text that is generated: --prompt, --prompt_file, --generate and --speculative."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from absl.flags import FlagValues

from odelm.config import Config, default_steps
from odelm.errors import InputError


def check(flags: FlagValues) -> None:
    """Raises InputError for flags that do not go together."""
    early_exits(flags)
    kv_spans(flags)
    if flags.prompt is not None and flags.prompt_file is not None:
        raise InputError("--prompt and --prompt_file were both given; give one")
    prompted = flags.prompt is not None or flags.prompt_file is not None
    chosen = [name for name in ("generate", "baseline") if flags[name].value]
    if len(chosen) + prompted > 1:
        names = [*(["prompt" if flags.prompt is not None else "prompt_file"] if prompted else []), *chosen]
        raise InputError(f"--{' and --'.join(names)} were both given; give one")
    names = ["prompt"] if flags.prompt is not None else ["prompt_file"] if prompted else chosen
    if names and flags.adaptive_tolerance is not None:
        raise InputError(f"--{names[0]} takes no --adaptive_tolerance: it crosses the depth in given steps")
    calibrated = any(kind.endswith("static") for kind in flags.quantize or ())
    if prompted and flags.text is not None and not calibrated:
        raise InputError(f"--{names[0]} takes no --text: no losses are measured")
    if chosen and flags.integrator != "scan":
        raise InputError(f"--{chosen[0]} takes no --integrator: it crosses the depth by the scan")
    if flags.draft_steps is not None and not flags.speculative:
        raise InputError("--draft_steps is of --speculative, which was not given")
    if flags["draft_length"].present and flags.draft_steps is None:
        raise InputError("--draft_length is of drafts in given steps: give --speculative and --draft_steps too")
    for name in ("speculative", "prefill_steps", "kernel"):
        if (flags[name].present if name == "kernel" else flags[name].value) and not (flags.generate or prompted):
            raise InputError(f"--{name} is of generated text: give --prompt, --prompt_file or --generate too")
    if flags.speculative and prompted and flags.kernel not in ("auto", "xla"):
        raise InputError(f"--kernel={flags.kernel} takes no --speculative: leave out one of them")
    if flags.window is not None and not prompted:
        raise InputError("--window is of a text that is continued: give --prompt or --prompt_file too")
    others = dict(speculative=flags.speculative, early_exit=flags.early_exit, integrator=flags.integrator != "scan")
    for name, given in others.items():
        if flags.window is not None and given:
            raise InputError(f"--window and --{name} were given, which do not go together: leave out one of them")
    if flags.early_exit is not None and flags.baseline is not None:
        raise InputError("--early_exit and --baseline were given, which do not go together: leave out one of them")
    for name in ("speculative", "prefill_steps"):
        if flags.early_exit and flags[name].value:
            raise InputError(f"--early_exit takes no --{name}: it goes with one grid, and without drafts")
    if flags.speculative and flags.prefill_steps is not None and prompted:
        raise InputError("--speculative takes no --prefill_steps: the prompt crosses the depth as drafts are verified")
    if flags.speculative and (flags.integrator != "scan" or flags.solver != "euler"):
        raise InputError("--speculative takes neither --solver nor --integrator: full depth in unit steps verifies")


def _prompt(flags: FlagValues) -> str:
    if flags.prompt is not None:
        return flags.prompt
    try:
        return Path(flags.prompt_file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt_file={flags.prompt_file} cannot be read as UTF-8 text ({error})") from error


def continue_prompt(loaded: Any, flags: FlagValues, steps_of: Callable[[Config], tuple[int, ...]]) -> None:
    """Prints the prompt and its continuation, with each number of steps; which number that is goes to stderr."""
    from odelm import tokenizer as tokenizers
    from odelm.infer.generate import continue_text
    from odelm.infer.runner import Runner

    prompt = _prompt(flags)
    model, config, tokenizer = loaded
    tokenizer = tokenizers.needed(tokenizer)
    runner = Runner.of(model)
    options: dict[str, Any] = dict(
        new_tokens=flags.new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        seed=flags.seed,
        end_token=config.data.end_token,
        window=flags.window,
        kernel=flags.kernel,
        say=partial(print, file=sys.stderr),
    )
    for name, plan in (plans := _plans(runner, flags, steps_of(config))).items():
        if flags.prefill_steps is not None:
            options["prefill_plan"] = runner.plan(flags.prefill_steps, flags.solver)
        if flags.early_exit is not None:
            options["early_exit"] = one_exit(flags)
        if flags.speculative:
            options["drafting"] = _drafting(runner, tokenizer, plan, prompt, flags, config.data.end_token)
        text = continue_text(runner, tokenizer, prompt, plan=plan, **options)
        if len(plans) > 1:
            print(f"--- {name}", file=sys.stderr)
        print(text, flush=True)


def _plans(runner: Any, flags: FlagValues, counts: tuple[int, ...]) -> dict[str, Any]:
    """Returns how a prompt is continued, by name: by the model's profile, or in each number of steps."""
    profile = runner.model.profile
    if flags.speculative and flags.steps is None:
        counts = (runner.model.config.core,)
    elif profile is not None and (flags.solver, flags.integrator) == ("euler", "scan"):
        return {"the profile": runner.model.plan(grid=profile.grid, solver=profile.solver)}
    return {f"{count} steps": runner.plan(count, flags.solver, flags.integrator) for count in counts}


def early_exits(flags: FlagValues) -> tuple[Any, ...]:
    """Returns when to leave the steps early, for each of --early_exit; InputError for what is no tolerance."""
    if flags.early_exit is None:
        if flags["exit_measure"].present:
            raise InputError("--exit_measure is of --early_exit, which was not given")
        return ()
    from odelm.models.early_exit import EarlyExit

    try:
        tolerances = [float(text) for text in flags.early_exit]
    except ValueError:
        tolerances = []
    if not tolerances:
        raise InputError(f"--early_exit is {','.join(flags.early_exit)!r}, expected tolerances such as 0.1,0.2")
    return tuple(EarlyExit(tolerance, flags.exit_measure) for tolerance in tolerances)


def one_exit(flags: FlagValues) -> Any:
    """Returns when a text that is generated leaves the steps early."""
    rules = early_exits(flags)
    if len(rules) != 1:
        raise InputError(f"--early_exit has {len(rules)} tolerances; a prompt is continued by one")
    return rules[0]


def kv_spans(flags: FlagValues) -> tuple[int, ...]:
    """Returns the spans of --kv_span; InputError for what is none."""
    try:
        spans = tuple(int(text) for text in flags.kv_span or ())
    except ValueError:
        spans = ()
    if flags.kv_span is not None and (not spans or min(spans) < 1):
        raise InputError(f"--kv_span is {','.join(flags.kv_span)!r}, expected whole numbers of at least 1, such as 2,4")
    return spans


def one_span(flags: FlagValues) -> int:
    """Returns the units of depth over which a model shares keys and values."""
    spans = kv_spans(flags)
    if len(spans) != 1:
        raise InputError(f"--kv_span has {len(spans)} values, of which only --generate compares several: give one")
    return spans[0]


def _drafting(runner: Any, tokenizer: Any, plan: Any, prompt: str, flags: FlagValues, end_token: str) -> Any:
    """Returns the drafts that were asked for, or the fastest of those tried on the prompt; None if none is faster."""
    from odelm.infer.draft_choice import describe, try_drafts
    from odelm.infer.drafts import make_drafting
    from odelm.infer.generator import Generator

    if flags.draft_steps is not None:
        return make_drafting(runner.plan(flags.draft_steps, "euler"), flags.draft_length)
    plain = Generator.of(runner, tokenizer, plan, kernel=flags.kernel, end_token=end_token)
    trials = try_drafts(
        plain, [prompt], new_tokens=min(flags.new_tokens, 48),
        temperature=flags.temperature, top_k=flags.top_k, seed=flags.seed,
    )  # fmt: skip
    print(describe(trials), file=sys.stderr)
    return trials[0].drafting


def drafts(config: Config, flags: FlagValues) -> list[tuple[int, int]]:
    """Returns the steps and the lengths of the drafts to compare."""
    if not flags.speculative:
        return []
    if flags.draft_steps is not None:
        return [(flags.draft_steps, flags.draft_length)]
    coarse = [count for count in default_steps(config.model) if count < config.model.core]
    return [(count, length) for count in coarse for length in (2, 4)]

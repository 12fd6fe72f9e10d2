"""Compares coarse steps with full depth on held-out text: what is measured, on which text, and where it is written."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from odelm import pretrained
from odelm import tokenizer as tokenizers
from odelm.config import Config, DataConfig, TrainConfig
from odelm.config import replace as with_options
from odelm.data.examples import HeldOutExamples, read_task_data
from odelm.data.loader import HeldOutRows, held_out_rows
from odelm.data.prepare import prepare, read_text
from odelm.errors import InputError
from odelm.evals.candidates import crossing
from odelm.evals.examples import add_scores
from odelm.evals.generation import compare_ways, make_generator, ways
from odelm.evals.generation_report import make_generation_report, plot_generation, print_generation
from odelm.evals.report import make_report, publish
from odelm.evals.sweep import Setting, settings, sweep
from odelm.infer.prompts import some_tokens
from odelm.infer.room import check_generation
from odelm.infer.runner import Runner
from odelm.models import CausalLM, Classifier, MaskedLM
from odelm.models.early_exit import EarlyExit
from odelm.models.loss import Batch
from odelm.run_directory import TOKENIZER, read_config

EVAL_SEQUENCES, EVAL_TOKENS = 32, 4096
"""Sequences in a batch of `Comparison.eval_batches`, independent of the training batch, so that losses of a folder and
of runs can be compared; and the tokens that are in memory at once, which does not affect losses."""
LENGTH, EVAL_BATCHES = 128, 8
"""Defaults of a comparison that does not use a run's own settings."""

Loaded = tuple[Any, Config, Tokenizer | None]


@dataclass(frozen=True)
class Comparison:
    """What to measure, besides the step counts."""

    solver: str = "euler"
    integrator: str = "scan"
    tolerance: float | None = None
    """Also lets the solver choose its steps, to this tolerance."""
    early_exits: tuple[EarlyExit, ...] = ()
    """Also measures each number of steps with early exits: a row, or a generated token, leaves once settled by one of
    these."""
    kv_spans: tuple[int, ...] = ()
    """Also generates with keys and values shared over so many units of depth."""
    kernel: str = "auto"
    """What decodes text in one grid, as in `odelm.Generator`."""
    batch: int = 1
    length: int | None = None
    """Tokens in a sequence, timed and evaluated; None is the length that a run was trained with, and 128 for others."""
    repeats: int = 30
    eval_batches: int | None = None
    """Held-out batches of 32 sequences. None takes the sequences on which a run was evaluated while it was trained, so
    that the losses are the same, and 8 batches of a text; 0 skips the losses."""
    text: str | None = None
    """Files to measure the losses on; None takes the held-out split of a run's own corpus."""


def compare(
    loaded: Loaded,
    steps: tuple[int, ...],
    options: Comparison,
    *,
    source: Path,
    step: int | None,
    out: Path | None = None,
    adjust: Callable[[Config], Config] | None = None,
) -> Path:
    """Measures a model at each step count, prints the table, and returns the directory of the written report.

    Args:
        loaded: as `odelm.load` returns it, from `source`.
        step: the run's checkpoint; None for a Hugging Face folder.
        out: the directory of the report; `infer` in the source if it is None.
        adjust: applied to the config of the model that the run was adapted from.

    Raises InputError for options that the model cannot take, for a text that cannot be read, and for a report that
    cannot be written (the table is still printed).
    """
    model, config, tokenizer = loaded
    length = length_of(config, options, run=step is not None)
    runner = Runner.of(model)
    chosen = settings(
        runner, steps, solver=options.solver, tolerance=options.tolerance, integrator=options.integrator,
        early_exits=options.early_exits,
    )  # fmt: skip
    own = profile_of(loaded)
    chosen += [own] if own is not None and own not in chosen else []
    rows, batches = batches_of(loaded, options, source=source, step=step)
    baseline = _adapted_from(config, adjust) if batches else None
    measured = sweep(
        runner,
        chosen,
        batch=options.batch,
        length=length,
        held_out=batches,
        repeats=options.repeats,
        before=None if baseline is None else Runner.of(baseline),
    )
    for setting, row in zip(chosen, measured, strict=True):
        row["chosen"] = setting == own
    if isinstance(rows, HeldOutExamples):
        add_scores(runner, chosen, measured, rows, batches)
    out = source / "infer" if out is None else out
    text = None if rows is None else text_of(rows, batches, config, options)
    trained = trained_counts(config, source, step)
    return publish(make_report(config.model, measured, step=step, text=text, trained=trained), out)


def trained_counts(config: Config, source: Path, step: int | None) -> tuple[int, ...]:
    """Returns the counts of steps that a model was trained with: none if its `kv_span` differs from that of the run."""
    if step is None:
        return (config.model.core,)
    return config.trained_counts if config.model.kv_span == read_config(source).model.kv_span else ()


def profile_of(loaded: Loaded) -> Setting | None:
    """Returns the way to cross the depth that the model's profile has, None without one."""
    model, config, _ = loaded
    return model.profile and crossing(config.model, model.profile.solver, model.profile.grid)


def compare_generation(
    loaded: Loaded,
    steps: tuple[int, ...],
    options: Comparison,
    *,
    source: Path,
    step: int | None,
    new_tokens: int,
    prefill_steps: int | None = None,
    drafts: Sequence[tuple[int, int]] = (),
    out: Path | None = None,
) -> Path:
    """Measures ways to generate text with a decoder, prints the table, and returns the directory of the report.

    Prompts are the first halves of held-out sequences of `options.length`. The arguments are those of `compare` and of
    `odelm.evals.generation.ways`.
    """
    model, config, tokenizer = loaded
    if config.model.kind != "decoder":
        raise InputError("text is generated by decoders; this model is an encoder")
    length = length_of(config, options, run=step is not None)
    if length < 2:
        raise InputError(f"--length is {length}, expected at least 2: half of it is a prompt")
    runner = Runner.of(model)
    chosen = ways(
        runner, steps, solver=options.solver, prefill_steps=prefill_steps, drafts=drafts,
        early_exits=options.early_exits, kv_spans=options.kv_spans,
    )  # fmt: skip
    rows, batches = batches_of(loaded, options, source=source, step=step)
    for way in chosen:
        check_generation(make_generator(runner, way, options.solver), options.batch, length // 2, new_tokens)
    given = some_tokens(batches, config.model, batch=options.batch, length=length // 2).tolist()
    measured = compare_ways(
        runner, chosen, given, new_tokens=new_tokens, held_out=batches, solver=options.solver, repeats=options.repeats,
        kernel=options.kernel,
    )  # fmt: skip
    text = None if rows is None else text_of(rows, batches, config, options)
    report = make_generation_report(config.model, measured, text=text, quantization=model.quantization)
    out = source / "infer" if out is None else out
    return publish(report, out, name="generation", draw=plot_generation, show=print_generation, width=120)


def batches_of(
    loaded: Loaded, options: Comparison, *, source: Path, step: int | None
) -> tuple[HeldOutRows | HeldOutExamples | None, list[Batch]]:
    """Returns the rows to measure losses on, and their batches: None and an empty list if there is no text."""
    length = length_of(loaded[1], options, run=step is not None)
    rows = _held_out_or_why(loaded, options, None if step is None else source / TOKENIZER)
    return rows, [] if rows is None else list(rows.batches(batch_size(len(rows), length)))


def length_of(config: Config, options: Comparison, *, run: bool) -> int:
    """Returns how many tokens a sequence has; InputError for more than the model's positions."""
    limit = config.model.max_length
    if options.length is None:
        return config.train.length if run else min(LENGTH, limit)
    if options.length > limit:
        raise InputError(f"--length is {options.length}, past the model's {limit} positions; try --length={limit}")
    return options.length


def batch_size(rows: int, length: int) -> int:
    """Returns how many sequences to compute at once: as many as fit, and without padding if possible."""
    sizes = [size for size in (32, 16, 8, 4, 2, 1) if size == 1 or size * length <= EVAL_TOKENS]
    return next((size for size in sizes if rows % size == 0 and size * 4 > sizes[0]), sizes[0])


def text_of(
    rows: HeldOutRows | HeldOutExamples, batches: Sequence[Batch], config: Config, options: Comparison
) -> dict[str, Any]:
    """Returns the description of the text for a report."""
    source = options.text or config.data.valid_source or config.data.source or config.data.corpus
    tokens = int(sum(batch["weights"].sum() for batch in batches))
    said = {"source": source, "tokens": tokens, "documents": rows.documents}
    if isinstance(rows, HeldOutExamples):
        said |= {"task": config.data.task, "majority": rows.majority()}
    return said


class NoText(InputError):
    """There is no text to measure losses on, or the model has no loss."""


def _held_out_or_why(
    loaded: Loaded, options: Comparison, tokenizer_file: Path | None
) -> HeldOutRows | HeldOutExamples | None:
    """Returns the result of `held_out`, or the held-out examples of a classifier.

    Returns None if no losses are asked for, and if there is no text, with the reason on standard error.
    """
    if options.eval_batches == 0:
        return None
    try:
        if isinstance(loaded[0], Classifier):
            return held_out_examples(loaded, options, tokenizer_file=tokenizer_file)
        return held_out(loaded, options, tokenizer_file=tokenizer_file)
    except NoText as error:
        print(f"no losses: {error}", file=sys.stderr)
        return None


def held_out(loaded: Loaded, options: Comparison, *, tokenizer_file: Path | None) -> HeldOutRows:
    """Returns the rows to measure losses on: of the given text, else of the run whose tokenizer is given.

    Raises NoText for a folder without a text, for models without a loss, and for a run whose text cannot be read, such
    as on another machine.
    """
    model, config, tokenizer = loaded
    if not isinstance(model, CausalLM | MaskedLM):
        raise NoText(f"a {type(model).__name__} has no language model's head")
    if options.text is not None:
        prepared = read_text(options.text, tokenizers.needed(tokenizer), config.data)
        # Rows and masks of a text are the same however a model was trained, so that losses can be compared.
        seed = dataclasses.replace(config.train, seed=TrainConfig().seed)
        config = dataclasses.replace(config, data=DataConfig(end_token=config.data.end_token), train=seed)
    elif tokenizer_file is not None:
        try:
            prepared = prepare(config, tokenizer_file=tokenizer_file)
        except InputError as error:
            raise NoText(f"the run's text cannot be read ({error}); --text=FILE measures them on another") from error
    else:
        raise NoText("give --text=FILE to measure them")
    length = length_of(config, options, run=tokenizer_file is not None)
    return held_out_rows(prepared, config, length=length, limit=_limit(config, options))


def held_out_examples(loaded: Loaded, options: Comparison, *, tokenizer_file: Path | None) -> HeldOutExamples:
    """Returns the examples to measure a classifier on: those of the task of a run whose tokenizer is given.

    Raises NoText for a classifier that is not a run, for a text, and for a task whose files cannot be read.
    """
    _, config, _ = loaded
    if not config.data.task or tokenizer_file is None or options.text is not None:
        raise NoText("a classifier is measured on the examples of its run's task: give a run, and no --text")
    config = with_options(config, {"train.length": length_of(config, options, run=True)})
    try:
        return read_task_data(config, tokenizer_file=tokenizer_file).held_out(_limit(config, options))
    except InputError as error:
        raise NoText(f"the run's examples cannot be read ({error})") from error


def _limit(config: Config, options: Comparison) -> int:
    """Returns how many rows to measure at most: as many as a run evaluated, unless something else is asked for."""
    if options.eval_batches is None and options.text is None:
        return config.train.eval_batches * config.train.batch_size
    return EVAL_SEQUENCES * (options.eval_batches or EVAL_BATCHES)


def _adapted_from(config: Config, adjust: Callable[[Config], Config] | None) -> CausalLM | MaskedLM | None:
    """Returns the model that a run was adapted from; None if there was none, or if it can no longer be loaded."""
    if not config.init.from_pretrained or config.data.task:
        return None
    try:
        model = pretrained.load(config.init.from_pretrained, adjust=adjust, with_profile=False)[0]
        return model if isinstance(model, CausalLM | MaskedLM) else None
    except InputError as error:
        print(f"no losses of the model before adaptation: {error}", file=sys.stderr)
        return None

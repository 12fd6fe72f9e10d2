"""Compares coarse steps with full depth: latency and held-out loss; or generates text.

    python infer.py --workdir=runs/tiny [--steps=12,6,4,3] [--solver=euler] [--batch=1] [--length=128]
    python infer.py --workdir=runs/tiny --solver=kvaerno3 --integrator=diffrax
    python infer.py --workdir=runs/tiny --prompt="def main(" --steps=3
    python infer.py --model=FOLDER --steps=12,6,4,3 --text=FILE

The model is a training run or a Hugging Face folder, under either flag. The comparison is printed and written to
`infer/report.json` and `infer/report.png` in it, or to --out. Of a run that adapted an existing model the report also
has what that model lost at each step count before.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from odelm import cli
from odelm.config import Config, DataConfig, TrainConfig, default_steps
from odelm.errors import InputError

if TYPE_CHECKING:
    from odelm.models import CausalLM, MaskedLM

EVAL_SEQUENCES, EVAL_TOKENS = 32, 4096
"""What --eval_batches counts, whatever the batch of training, so that losses of a folder and of runs can be compared;
and how many tokens are in memory at once, which changes no loss."""

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
MODEL = flags.DEFINE_string("model", None, "The same, or a Hugging Face folder.")
TEXT = flags.DEFINE_string("text", None, "Measure the losses on this text (a file, folder or glob) instead.")
OUT = flags.DEFINE_string("out", None, "Directory of the report; default: infer/ in the run or folder.")
STEPS = flags.DEFINE_list("steps", None, "Numbers of depth steps; default: full depth, 1/2, 1/3 and 1/4 of it.")
SOLVER = flags.DEFINE_string("solver", "euler", "Name of the ODE solver.")
INTEGRATOR = flags.DEFINE_enum(
    "integrator",
    "scan",
    ["scan", "diffrax"],
    "Who crosses the depth; diffrax takes any solver.",
)
BATCH = flags.DEFINE_integer("batch", 1, "Sequences in the timed batch.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 128, "Tokens a sequence, timed and evaluated.", lower_bound=1)
DTYPE = flags.DEFINE_string("dtype", "auto", "Of matrix products: auto, float32, bfloat16 or float16.")
TOLERANCE = flags.DEFINE_float("adaptive_tolerance", None, "Also let the solver choose its steps, to this tolerance.")
REPEATS = flags.DEFINE_integer("repeats", 30, "Timed calls of each setting.", lower_bound=1)
EVAL_BATCHES = flags.DEFINE_integer(
    "eval_batches", 8, f"Held-out batches of {EVAL_SEQUENCES} sequences; 0 skips the losses.", lower_bound=0
)
PROMPT = flags.DEFINE_string("prompt", None, "Generate a continuation of this text instead.")
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 100, "Tokens to generate.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Of sampling; 0 takes the most likely token.", lower_bound=0.0)
TOP_K = flags.DEFINE_integer("top_k", 40, "Sample among this many most likely tokens.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
for name, expected in dict(workdir="a directory", model="a directory", out="a directory", text="files").items():
    flags.register_validator(name, lambda value: value != "", message=f"is empty, expected {expected}")


def main() -> None:
    from odelm import checkpoint, interop, pretrained

    source = _source()
    step = None if interop.is_folder(source) else _latest(checkpoint, source)
    model, config, tokenizer = pretrained.load(source, step=step, adjust=_with_dtype)
    if PROMPT.value is not None:
        _generate(model, _needed(tokenizer), _steps(config))
    else:
        _compare(model, config, tokenizer, _steps(config), step)


def _source() -> str:
    given = [value for value in (WORKDIR.value, MODEL.value) if value is not None]
    if len(given) != 1:
        raise InputError("give one of --workdir and --model: a training run or a Hugging Face folder")
    source = os.path.expanduser(given[0])
    if not os.path.isdir(source):
        raise InputError(f"{source} is not a directory; give a training run or a Hugging Face folder")
    return source


def _latest(checkpoint, workdir: str) -> int:
    checkpoint.read_config(workdir)
    return checkpoint.latest_step(workdir)


def _with_dtype(config: Config) -> Config:
    model = dataclasses.replace(config.model, dtype=DTYPE.value, residual_dtype="auto")
    return dataclasses.replace(config, model=model)


def _steps(config: Config) -> tuple[int, ...]:
    if STEPS.value is None:
        return default_steps(config.model)
    if not STEPS.value:
        raise InputError("--steps is empty, expected whole numbers such as 12,6,3")
    try:
        return tuple(int(count) for count in STEPS.value)
    except ValueError:
        raise InputError(f"--steps is {','.join(STEPS.value)}, expected whole numbers such as 12,6,3") from None


def _needed(tokenizer):
    if tokenizer is None:
        raise InputError(
            f"{_source()} has no tokenizer.json, which text needs: save one there "
            "(a fast tokenizer's save_pretrained in transformers)"
        )
    return tokenizer


def _generate(model, tokenizer, steps: tuple[int, ...]) -> None:
    from odelm.infer.generate import generate
    from odelm.infer.runner import Runner
    from odelm.tokenizer import special_id

    runner = Runner.of(model)
    for count in steps:
        tokens = generate(
            runner,
            tokenizer.encode(PROMPT.value, add_special_tokens=False).ids,
            plan=runner.plan(count, SOLVER.value, INTEGRATOR.value),
            new_tokens=NEW_TOKENS.value,
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            seed=SEED.value,
            end=special_id(tokenizer, "end"),
        )
        if len(steps) > 1:
            print(f"--- {count} steps")
        print(PROMPT.value + tokenizer.decode(tokens))


def _compare(model, config: Config, tokenizer, steps: tuple[int, ...], step: int | None) -> None:
    from rich.console import Console

    from odelm.evals.report import make_report, print_table, write_report
    from odelm.evals.sweep import settings, sweep
    from odelm.infer.runner import Runner

    if LENGTH.value > config.model.max_length:
        raise InputError(
            f"--length is {LENGTH.value}, past the model's {config.model.max_length} positions; "
            f"try --length={config.model.max_length}"
        )
    runner = Runner.of(model)
    chosen = settings(runner, steps, solver=SOLVER.value, tolerance=TOLERANCE.value, integrator=INTEGRATOR.value)
    held_out = _held_out(model, config, tokenizer, run=step is not None)
    before = _before(config) if held_out else None
    rows = sweep(
        runner,
        chosen,
        batch=BATCH.value,
        length=LENGTH.value,
        held_out=held_out,
        repeats=REPEATS.value,
        before=None if before is None else Runner.of(before),
    )
    report = make_report(config.model, rows, step=step)
    # A file has no width of its own; a terminal's may cut the numbers short.
    console = Console(width=None if sys.stdout.isatty() else 100)
    out = Path(OUT.value).expanduser() if OUT.value else Path(_source()) / "infer"
    try:
        write_report(report, out)
    except OSError as error:
        print_table(report, console)
        raise InputError(f"the report cannot be written to {out} ({error}); give --out") from error
    print_table(report, console)
    print(f"written to {out}")


def _held_out(model, config: Config, tokenizer, *, run: bool) -> list:
    """Returns the batches to measure losses on; none for a folder without --text, and for models without a loss."""
    from odelm.data.loader import eval_batches
    from odelm.data.prepare import prepare, read_text
    from odelm.models import CausalLM, MaskedLM

    if not EVAL_BATCHES.value:
        return []
    if not isinstance(model, CausalLM | MaskedLM):
        print(f"no losses: a {type(model).__name__} has no language model's head", file=sys.stderr)
        return []
    if TEXT.value is not None:
        prepared = read_text(TEXT.value, _needed(tokenizer))
        # Rows and masks of another text are the same however a model was trained, so that losses can be compared.
        seed = dataclasses.replace(config.train, seed=TrainConfig().seed)
        config = dataclasses.replace(config, data=DataConfig(), train=seed)
    elif run:
        prepared = prepare(config, tokenizer_file=Path(_source()) / "tokenizer.json")
    else:
        print("no losses: give --text=FILE to measure them", file=sys.stderr)
        return []
    size = next(size for size in (32, 16, 8, 4, 2, 1) if size == 1 or size * LENGTH.value <= EVAL_TOKENS)
    limit = EVAL_BATCHES.value * EVAL_SEQUENCES // size
    return list(eval_batches(prepared, config, length=LENGTH.value, batch_size=size, limit=limit))


def _before(config: Config) -> "CausalLM | MaskedLM | None":
    """Returns the model that a run was adapted from; None if there was none, or it is no longer where it was."""
    from odelm import pretrained
    from odelm.models import CausalLM, MaskedLM

    if not config.init.from_pretrained:
        return None
    try:
        model = pretrained.load(config.init.from_pretrained, adjust=_with_dtype)[0]
        return model if isinstance(model, CausalLM | MaskedLM) else None
    except InputError as error:
        print(f"no losses of the model before adaptation: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv, usage=__doc__ or ""))

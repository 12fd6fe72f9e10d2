"""Compares coarse steps with full depth: latency and held-out loss; or generates text.

    python infer.py --workdir=runs/tiny [--steps=12,6,4,3] [--solver=euler] [--batch=1] [--length=128]
    python infer.py --workdir=runs/tiny --prompt="def main(" --steps=3

The comparison is printed and written to WORKDIR/infer/report.json and report.png.
"""

import dataclasses
import sys
from pathlib import Path

from absl import flags

from odelm import cli
from odelm.config import Config, default_steps
from odelm.errors import InputError

WORKDIR = flags.DEFINE_string("workdir", None, required=True, help="Directory of a training run.")
STEPS = flags.DEFINE_list("steps", None, "Numbers of depth steps; default: full depth, 1/2, 1/3 and 1/4 of it.")
SOLVER = flags.DEFINE_string("solver", "euler", "Name of the ODE solver.")
BATCH = flags.DEFINE_integer("batch", 1, "Sequences in the timed batch.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 128, "Tokens a sequence, timed and evaluated.", lower_bound=1)
DTYPE = flags.DEFINE_string("dtype", "auto", "Of matrix products: auto, float32, bfloat16 or float16.")
TOLERANCE = flags.DEFINE_float("adaptive_tolerance", None, "Also let the solver choose its steps, to this tolerance.")
REPEATS = flags.DEFINE_integer("repeats", 30, "Timed calls of each setting.", lower_bound=1)
EVAL_BATCHES = flags.DEFINE_integer("eval_batches", 32, "Held-out batches; 0 skips the losses.", lower_bound=0)
PROMPT = flags.DEFINE_string("prompt", None, "Generate a continuation of this text instead.")
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 100, "Tokens to generate.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Of sampling; 0 takes the most likely token.", lower_bound=0.0)
TOP_K = flags.DEFINE_integer("top_k", 40, "Sample among this many most likely tokens.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")


def main() -> None:
    from odelm import checkpoint

    checkpoint.read_config(WORKDIR.value)
    step = checkpoint.latest_step(WORKDIR.value)
    model, config, tokenizer = checkpoint.load(WORKDIR.value, step=step, adjust=_with_dtype)
    if PROMPT.value is not None:
        _generate(model, tokenizer, _steps(config))
    else:
        _compare(model, config, _steps(config), step)


def _with_dtype(config: Config) -> Config:
    model = dataclasses.replace(config.model, dtype=DTYPE.value, residual_dtype="auto")
    return dataclasses.replace(config, model=model)


def _steps(config: Config) -> tuple[int, ...]:
    if STEPS.value is None:
        return default_steps(config.model)
    try:
        return tuple(int(count) for count in STEPS.value)
    except ValueError:
        raise InputError(f"--steps is {','.join(STEPS.value)}, expected whole numbers such as 12,6,3") from None


def _generate(model, tokenizer, steps: tuple[int, ...]) -> None:
    from odelm.data.tokenizer import special_id
    from odelm.infer.encode import Runner
    from odelm.infer.generate import generate

    runner = Runner.of(model)
    for count in steps:
        tokens = generate(
            runner,
            tokenizer.encode(PROMPT.value, add_special_tokens=False).ids,
            plan=runner.plan(count, SOLVER.value),
            new_tokens=NEW_TOKENS.value,
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            seed=SEED.value,
            end=special_id(tokenizer, "end"),
        )
        if len(steps) > 1:
            print(f"--- {count} steps")
        print(PROMPT.value + tokenizer.decode(tokens))


def _compare(model, config: Config, steps: tuple[int, ...], step: int) -> None:
    from rich.console import Console

    from odelm.data.loader import eval_batches
    from odelm.data.prepare import prepare
    from odelm.evals.report import make_report, print_table, write_report
    from odelm.evals.sweep import settings, sweep
    from odelm.infer.encode import Runner

    if LENGTH.value > config.model.max_length:
        raise InputError(
            f"--length is {LENGTH.value}, past the model's {config.model.max_length} positions; "
            f"try --length={config.model.max_length}"
        )
    runner = Runner.of(model)
    chosen = settings(runner, steps, solver=SOLVER.value, tolerance=TOLERANCE.value)
    held_out = []
    if EVAL_BATCHES.value:
        prepared = prepare(config, tokenizer_file=Path(WORKDIR.value) / "tokenizer.json")
        held_out = list(eval_batches(prepared, config, length=LENGTH.value, limit=EVAL_BATCHES.value))
    rows = sweep(runner, chosen, batch=BATCH.value, length=LENGTH.value, held_out=held_out, repeats=REPEATS.value)
    report = make_report(config.model, rows, step=step)
    write_report(report, Path(WORKDIR.value) / "infer")
    print_table(report, Console())
    print(f"written to {Path(WORKDIR.value) / 'infer'}")


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv, usage=__doc__ or ""))

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
import sys
from pathlib import Path

from absl import flags

from odelm import cli
from odelm.config import Config, default_steps
from odelm.errors import InputError

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
MODEL = flags.DEFINE_string("model", None, "The same, or a Hugging Face folder.")
TEXT = flags.DEFINE_string("text", None, "Measure the losses on this text (a file, folder or glob) instead.")
OUT = flags.DEFINE_string("out", None, "Directory of the report; default: infer/ in the run or folder.")
STEPS = flags.DEFINE_list("steps", None, "Numbers of depth steps; default: full depth, 1/2, 1/3 and 1/4 of it.")
SOLVER = flags.DEFINE_string("solver", "euler", "Name of the ODE solver.")
INTEGRATOR = flags.DEFINE_enum(
    "integrator", "scan", ["scan", "diffrax"], "What integrates over the depth; diffrax takes any solver."
)
BATCH = flags.DEFINE_integer("batch", 1, "Sequences in the timed batch.", lower_bound=1)
LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens a sequence, timed and evaluated; default: as in training, or 128.", lower_bound=1
)
DTYPE = flags.DEFINE_string("dtype", "auto", "Of matrix products: auto, float32, bfloat16 or float16.")
TOLERANCE = flags.DEFINE_float("adaptive_tolerance", None, "Also let the solver choose its steps, to this tolerance.")
REPEATS = flags.DEFINE_integer("repeats", 30, "Timed calls of each setting.", lower_bound=1)
EVAL_BATCHES = flags.DEFINE_integer(
    "eval_batches",
    None,
    "Held-out batches of 32 sequences, 0 for none; default: what training evaluated, of a text 8.",
    lower_bound=0,
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
    from odelm.run_directory import read_config

    source = _source()
    if interop.is_folder(source):
        step = None
    else:
        read_config(source)  # its errors come before those of the checkpoints
        step = checkpoint.latest_step(source)
    loaded = pretrained.load(source, step=step, adjust=_with_dtype)
    steps = _steps(loaded[1])
    if PROMPT.value is not None:
        _generate(loaded, steps, PROMPT.value)
    else:
        _compare(loaded, steps, source, step)


def _source() -> Path:
    given = [value for value in (WORKDIR.value, MODEL.value) if value is not None]
    if len(given) != 1:
        raise InputError("give one of --workdir and --model: a training run or a Hugging Face folder")
    source = Path(given[0]).expanduser()
    if not source.is_dir():
        raise InputError(f"{source} is not a directory; give a training run or a Hugging Face folder")
    return source


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


def _generate(loaded, steps: tuple[int, ...], prompt: str) -> None:
    from odelm.evals.compare import needed
    from odelm.infer.generate import continue_text
    from odelm.infer.runner import Runner

    model, config, tokenizer = loaded
    runner = Runner.of(model)
    for count in steps:
        text = continue_text(
            runner,
            needed(tokenizer),
            prompt,
            plan=runner.plan(count, SOLVER.value, INTEGRATOR.value),
            new_tokens=NEW_TOKENS.value,
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            seed=SEED.value,
            end_token=config.data.end_token,
        )
        if len(steps) > 1:
            print(f"--- {count} steps")
        print(text)


def _compare(loaded, steps: tuple[int, ...], source: Path, step: int | None) -> None:
    from odelm.evals.compare import Comparison, compare

    options = Comparison(
        solver=SOLVER.value,
        integrator=INTEGRATOR.value,
        tolerance=TOLERANCE.value,
        batch=BATCH.value,
        length=LENGTH.value,
        repeats=REPEATS.value,
        eval_batches=EVAL_BATCHES.value,
        text=TEXT.value,
    )
    out = Path(OUT.value).expanduser() if OUT.value else None
    print(f"written to {compare(loaded, steps, options, source=source, step=step, out=out, adjust=_with_dtype)}")


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv, usage=__doc__ or ""))

"""Compares coarse steps with full depth: latency and held-out loss; or generates text.

    python infer.py --workdir=runs/tiny [--steps=12,6,4,3] [--solver=euler] [--batch=1] [--length=128]
    python infer.py --workdir=runs/tiny --solver=kvaerno3 --integrator=diffrax
    python infer.py --workdir=runs/tiny --max_loss_increase=0.5%
    python infer.py --workdir=runs/tiny --prompt="def main(" --steps=3
    python infer.py --model=FOLDER --steps=12,6,4,3 --text=FILE

The model is a training run or a Hugging Face folder, under either flag. The comparison is printed and written to
`infer/report.json` and `infer/report.png` in it, or to --out. Of a run that adapted an existing model the report also
has what that model lost at each step count before.

With --max_loss_increase the cheapest steps that keep that limit are searched, and saved as `profile.json` in the run or
folder, or in --out. Without --steps the profile is then used for generating, and compared too.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from odelm.config import Config, MeshConfig, default_steps
from odelm.errors import InputError
from odelm.files import is_url
from odelm.programs import command_line

if TYPE_CHECKING:
    from odelm.evals.compare import Comparison

FLAGS = command_line.new_flags()
_string, _integer, _float = (
    partial(define, flag_values=FLAGS) for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float)
)
_string("workdir", None, "Directory of a training run.")
_string("model", None, "The same, or a Hugging Face folder.")
_string("text", None, "Measure the losses on this text (a file, folder or glob) instead.")
_string("out", None, "Directory of the report; default: infer/ in the run or folder.")
flags.DEFINE_list(
    "steps", None, "Numbers of depth steps; default: full depth, 1/2, 1/3 and 1/4 of it.", flag_values=FLAGS
)
_string(
    "max_loss_increase",
    None,
    "Search for the cheapest steps whose loss is at most so much above that of full depth, such as 0.5% or 0.005.",
)
_string("solver", "euler", "Name of the ODE solver.")
flags.DEFINE_enum(
    "integrator",
    "scan",
    ["scan", "diffrax"],
    "What integrates over the depth; diffrax takes any solver.",
    flag_values=FLAGS,
)
_integer("batch", 1, "Sequences in the timed batch.", lower_bound=1)
_integer("length", None, "Tokens a sequence, timed and evaluated; default: as in training, or 128.", lower_bound=1)
_string("dtype", "auto", "Of matrix products: auto, float32, bfloat16 or float16.")
_integer("tensor", 1, "Devices that share out the parameters, for a model larger than one of them.", lower_bound=1)
_float("adaptive_tolerance", None, "Also let the solver choose its steps, to this tolerance.")
_integer("repeats", 30, "Timed calls of each setting.", lower_bound=1)
_integer(
    "eval_batches",
    None,
    "Held-out batches of 32 sequences, 0 for none; default: what training evaluated, of a text 8, for a search 32.",
    lower_bound=0,
)
_string("prompt", None, "Generate a continuation of this text instead.")
_integer("new_tokens", 100, "Tokens to generate.", lower_bound=1)
_float("temperature", 0.8, "Of sampling; 0 takes the most likely token.", lower_bound=0.0)
_integer("top_k", 40, "Sample among this many most likely tokens.", lower_bound=1)
_integer("seed", 0, "Of sampling.")
SEARCHED = ("steps", "solver", "integrator", "adaptive_tolerance", "prompt")
"""What --max_loss_increase takes the place of."""
for name, expected in dict(workdir="a directory", model="a directory", out="a directory", text="files").items():
    flags.register_validator(
        name, lambda value: value != "", message=f"is empty, expected {expected}", flag_values=FLAGS
    )


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 2 for a mistake."""
    return command_line.run(_infer, FLAGS, arguments, __doc__ or "")


def _infer() -> int:
    from odelm import checkpoint, interop, pretrained
    from odelm.run_directory import read_config

    limit = _max_loss_increase()
    source = _source()
    if interop.is_folder(source):
        step = None
    else:
        read_config(source)  # its errors come before those of the checkpoints
        step = checkpoint.newest_whole(source)
    uses_profile = FLAGS.steps is None and limit is None
    loaded = pretrained.load(source, step=step, adjust=_with_dtype, mesh=_mesh(), with_profile=uses_profile)
    if limit is not None:
        _find_profile(loaded, limit, source, step)
        return 0
    steps = _steps(loaded[1])
    if FLAGS.prompt is not None:
        _generate(loaded, steps, FLAGS.prompt)
    else:
        _compare(loaded, steps, source, step)
    return 0


def _max_loss_increase() -> float | None:
    """Returns --max_loss_increase as a share; InputError for what is none, and for flags that do not go with it."""
    text = FLAGS.max_loss_increase
    if text is None:
        return None
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        limit = float(number) / (100 if percent else 1)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1:
        raise InputError(
            f"--max_loss_increase is {text!r}, expected a share of the loss from 0 to below 1, such as 0.5% or 0.005"
        )
    others = {name: FLAGS[name].value not in (None, FLAGS[name].default) for name in SEARCHED}
    if FLAGS.eval_batches == 0 or any(others.values()):
        name = next((name for name, given in others.items() if given), "eval_batches=0")
        raise InputError(f"--max_loss_increase searches steps and solver on held-out text: leave out --{name}")
    return limit


def _mesh() -> Any:
    """Returns the mesh that the parameters are cut over, None for one device."""
    if FLAGS.tensor == 1:
        return None
    from odelm.sharding import make_mesh

    return make_mesh(MeshConfig(data=1, tensor=FLAGS.tensor))


def _source() -> Path:
    from odelm import checkpoint, remote

    given = [value for value in (FLAGS.workdir, FLAGS.model) if value is not None]
    if len(given) != 1:
        raise InputError("give one of --workdir and --model: a training run or a Hugging Face folder")
    if is_url(given[0]):
        return remote.fetched(given[0], checkpoint.to_stderr)
    source = Path(given[0]).expanduser()
    if not source.is_dir():
        raise InputError(f"{source} is not a directory; give a training run or a Hugging Face folder")
    return source


def _with_dtype(config: Config) -> Config:
    model = dataclasses.replace(config.model, dtype=FLAGS.dtype, residual_dtype="auto")
    return dataclasses.replace(config, model=model)


def _steps(config: Config) -> tuple[int, ...]:
    if FLAGS.steps is None:
        return default_steps(config.model)
    if not FLAGS.steps:
        raise InputError("--steps is empty, expected whole numbers such as 12,6,3")
    try:
        return tuple(int(count) for count in FLAGS.steps)
    except ValueError:
        raise InputError(f"--steps is {','.join(FLAGS.steps)}, expected whole numbers such as 12,6,3") from None


def _generate(loaded, steps: tuple[int, ...], prompt: str) -> None:
    from odelm import tokenizer as tokenizers
    from odelm.infer.generate import continue_text
    from odelm.infer.runner import Runner

    model, config, tokenizer = loaded
    runner = Runner.of(model)
    plans = {f"{count} steps": partial(runner.plan, count, FLAGS.solver, FLAGS.integrator) for count in steps}
    own = model.profile
    if own is not None and (FLAGS.solver, FLAGS.integrator) == ("euler", "scan"):
        plans = {"the profile": partial(model.plan, grid=own.grid, solver=own.solver)}
    for name, plan in plans.items():
        text = continue_text(
            runner,
            tokenizers.needed(tokenizer),
            prompt,
            plan=plan(),
            new_tokens=FLAGS.new_tokens,
            temperature=FLAGS.temperature,
            top_k=FLAGS.top_k,
            seed=FLAGS.seed,
            end_token=config.data.end_token,
        )
        if len(plans) > 1:
            print(f"--- {name}")
        print(text)


def _options() -> "Comparison":
    from odelm.evals.compare import Comparison

    return Comparison(
        solver=FLAGS.solver,
        integrator=FLAGS.integrator,
        tolerance=FLAGS.adaptive_tolerance,
        batch=FLAGS.batch,
        length=FLAGS.length,
        repeats=FLAGS.repeats,
        eval_batches=FLAGS.eval_batches,
        text=FLAGS.text,
    )


def _out() -> Path | None:
    return Path(FLAGS.out).expanduser() if FLAGS.out else None


def _compare(loaded, steps: tuple[int, ...], source: Path, step: int | None) -> None:
    from odelm.evals.compare import compare

    written = compare(loaded, steps, _options(), source=source, step=step, out=_out(), adjust=_with_dtype)
    print(f"written to {written}")


def _find_profile(loaded, limit: float, source: Path, step: int | None) -> None:
    from odelm.evals.dial import find_profile

    print(f"written to {find_profile(loaded, limit, _options(), source=source, step=step, out=_out())}")

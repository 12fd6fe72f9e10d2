"""Compares coarse steps with full depth: latency and held-out loss; or generates text.

    python infer.py --workdir=runs/tiny [--steps=12,6,4,3] [--solver=euler] [--batch=1] [--length=128]
    python infer.py --workdir=runs/tiny --solver=kvaerno3 --integrator=diffrax
    python infer.py --workdir=runs/tiny --max_loss_increase=0.5%
    python infer.py --workdir=runs/tiny --early_exit=0.1,0.2 --steps=4 [--exit_measure=prediction]
    python infer.py --workdir=runs/tiny --generate [--kernel=xla]
    python infer.py --workdir=runs/tiny --generate [--prefill_steps=12] [--speculative] [--early_exit=0.1] [--kv_span=4]
    python infer.py --workdir=runs/tiny --prompt="def main(" --steps=3
    python infer.py --workdir=runs/tiny --prompt_file=FILE --speculative
    python infer.py --model=FOLDER --steps=12,6,4,3 --text=FILE
    python infer.py --workdir=runs/tiny --baseline=runs/other
    python infer.py --workdir=runs/tiny --quantize=int8,int8_static --steps=12,3
    python infer.py --workdir=runs/tiny --export=BUNDLE --steps=12,3

The model is a training run, a bundle or a Hugging Face folder, under either flag. The comparison is printed and written
to `infer/report.json` and `infer/report.png` in it, or to --out; with --generate, to `infer/generation.json` and
`infer/generation.png`. Of a run that adapted an existing model the report also has what that model lost at each step
count before. A bundle is a model in a folder of its own, with a forward pass for each step count that a process with
JAX alone can call.

With --max_loss_increase the cheapest steps that keep that limit are searched, and saved as `profile.json` in the run or
folder, or in --out. Without --steps the profile is then used for generating, and compared too.

With --early_exit rows of a batch, or generated tokens, cross the rest of the depth in one step once they have settled.

With --quantize the model is compared with copies of it whose matrices, and optionally their inputs, have 8 bits; with
--prompt or --generate the text is that of one such copy.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from odelm.config import Config, MeshConfig, default_steps
from odelm.errors import InputError
from odelm.programs import command_line, dial, export, generation, quantization, sources

if TYPE_CHECKING:
    from odelm.evals.compare import Comparison

FLAGS = command_line.new_flags()
_string, _integer, _float = (
    partial(define, flag_values=FLAGS) for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float)
)
_string("workdir", None, "Directory of a training run.")
_string("model", None, "The same, or a bundle, a Hugging Face folder, or the name of a model that comes with odelm.")
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
_string("profile_file", None, "Cross the depth as this profile of the model says; default: profile.json beside it.")
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
flags.DEFINE_list(
    "quantize",
    None,
    "Kinds of 8 bits to compare: int8 or fp8 (matrices), with _dynamic or _static (their inputs too).",
    flag_values=FLAGS,
)
_string("baseline", None, "Another run, bundle or folder, compared with at equal latency.")
flags.DEFINE_boolean(
    "generate", False, "Compare the generation of text: time and memory a token, each way.", flag_values=FLAGS
)
_integer("prefill_steps", None, "Also cross the depth in so many steps for the prompt.", lower_bound=1)
flags.DEFINE_boolean(
    "speculative", False, "Draft in coarse steps and verify at full depth: the same text, sooner.", flag_values=FLAGS
)
flags.DEFINE_list(
    "early_exit",
    None,
    "Also leave each of --steps, or full depth, where the state has settled to these tolerances, such as 0.1,0.2.",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "exit_measure",
    "state",
    ["state", "prediction"],
    "What settles: the state, by Euler's error estimate, or the prediction.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "kv_span",
    None,
    "Units of depth that share keys and values, in place of the model's own; with --generate several to compare.",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "kernel",
    "auto",
    ["auto", "persistent", "launches", "xla"],
    "What decodes text: a kernel on a Hopper GPU (up to 32 rows; 16 at width 1,024) or XLA; auto takes a kernel that "
    "supports the case.",
    flag_values=FLAGS,
)
_integer("draft_steps", None, "Steps of the drafts; default: those that are fastest on the prompts.", lower_bound=1)
_integer("draft_length", 4, "Most tokens of a draft, with --draft_steps.", lower_bound=1)
_integer(
    "window",
    None,
    "With --prompt: positions that a token sees; the text may be longer than the model's.",
    lower_bound=1,
)
_string("prompt", None, "Generate a continuation of this text instead.")
_string("prompt_file", None, "The same, of the text in a file.")
_string("export", None, "Write the model to this new directory instead, with its forward pass at each of --steps.")
flags.DEFINE_enum(
    "storage",
    "full",
    ["full", "int8"],
    "Of --export: parameters as they are, or in 8 bits, which load as float32.",
    flag_values=FLAGS,
)
_integer("new_tokens", 100, "Tokens to generate.", lower_bound=1)
_float("temperature", 0.8, "Of sampling; 0 takes the most likely token.", lower_bound=0.0)
_integer("top_k", 40, "Sample among this many most likely tokens; 0: among all.", lower_bound=0)
_integer("seed", 0, "Of sampling.")
for name, expected in dict(
    workdir="a directory",
    model="a directory",
    out="a directory",
    text="files",
    prompt_file="a file",
    profile_file="a file",
    export="a directory",
    baseline="a directory",
).items():
    flags.register_validator(
        name, lambda value: value != "", message=f"is empty, expected {expected}", flag_values=FLAGS
    )


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 2 for a mistake."""
    less_memory = "try a smaller --batch or --length, for text fewer --new_tokens, or a device with more memory"
    return command_line.run(_infer, FLAGS, arguments, __doc__ or "", less_memory=less_memory)


def _infer() -> int:
    from odelm import bundle, pretrained

    limit = dial.max_loss_increase(FLAGS)
    source, target = _source(), export.target(FLAGS)
    bundled = bundle.is_bundle(source)
    step = None if bundled else sources.updates_of(source)
    generation.check(FLAGS)
    quantization.check(FLAGS)
    others = (FLAGS.steps, limit, target, FLAGS.quantize, FLAGS.early_exit, FLAGS.kv_span)
    uses_profile = all(other is None for other in others)
    dial.check_profile_file(FLAGS)
    loaded = pretrained.load(
        source, step=step, adjust=None if target else _with_options, mesh=_mesh(), with_profile=uses_profile,
        profile=None if target else FLAGS.profile_file,
    )  # fmt: skip
    step = sources.updates_of(source) if bundled else step  # loading a bundle has checked its files
    if quantization.one_kind(FLAGS):
        loaded = quantization.quantized(loaded, FLAGS, _options(source), _steps, source=source, step=step)
    if limit is not None:
        dial.find_profile(loaded, limit, _options(source), source=source, step=step, out=_out(source))
    elif target is not None:
        export.export(loaded, target, _steps(loaded[1]), FLAGS, source=source, step=step)
    elif FLAGS.prompt is not None or FLAGS.prompt_file is not None:
        generation.continue_prompt(loaded, FLAGS, _steps)
    else:
        _compare(loaded, _steps(loaded[1]), source, step)
    return 0


def _mesh() -> Any:
    """Returns the mesh that the parameters are cut over, None for one device."""
    if FLAGS.tensor == 1:
        return None
    from odelm.sharding import make_mesh

    return make_mesh(MeshConfig(data=1, tensor=FLAGS.tensor))


def _source() -> Path:
    given = [value for value in (FLAGS.workdir, FLAGS.model) if value is not None]
    if len(given) != 1:
        raise InputError("give one of --workdir and --model: a training run, a bundle or a Hugging Face folder")
    return sources.found(given[0])


def _with_dtype(config: Config) -> Config:
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, dtype=FLAGS.dtype, residual_dtype="auto")
    )


def _with_options(config: Config) -> Config:
    config = _with_dtype(config)
    if FLAGS.kv_span is not None and not FLAGS.generate:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, kv_span=generation.one_span(FLAGS))
        )
    return config


def _steps(config: Config) -> tuple[int, ...]:
    if FLAGS.steps is None:
        return default_steps(config.model)
    if FLAGS.export is not None and FLAGS.steps == ["none"]:
        return ()
    if not FLAGS.steps:
        raise InputError("--steps is empty, expected whole numbers such as 12,6,3")
    try:
        return tuple(int(count) for count in FLAGS.steps)
    except ValueError:
        raise InputError(f"--steps is {','.join(FLAGS.steps)}, expected whole numbers such as 12,6,3") from None


def _options(source: Path) -> "Comparison":
    from odelm import shipped
    from odelm.evals.compare import Comparison

    return Comparison(
        solver=FLAGS.solver,
        integrator=FLAGS.integrator,
        tolerance=FLAGS.adaptive_tolerance,
        batch=FLAGS.batch,
        length=FLAGS.length,
        repeats=FLAGS.repeats,
        eval_batches=FLAGS.eval_batches,
        text=FLAGS.text or shipped.held_out(source),
        early_exits=generation.early_exits(FLAGS),
        kv_spans=generation.kv_spans(FLAGS) if FLAGS.generate else (),
        kernel=FLAGS.kernel,
    )


def _out(source: Path) -> Path | None:
    """Returns where reports go, None for `infer/` in the source."""
    from odelm import shipped
    from odelm.evals.report import check_out

    if FLAGS.out:
        return check_out(Path(FLAGS.out).expanduser())
    own = shipped.reports(source)
    if own is None:
        check_out(source / "infer")
        return None
    return check_out(own / "infer")


def _compare(loaded, steps: tuple[int, ...], source: Path, step: int | None) -> None:
    from odelm import pretrained
    from odelm.evals.baseline import compare_with_baseline
    from odelm.evals.compare import compare, compare_generation
    from odelm.evals.quantization import compare_quantized

    options, out = _options(source), _out(source)
    if FLAGS.generate:
        written = compare_generation(
            loaded, steps, options, source=source, step=step, new_tokens=FLAGS.new_tokens,
            prefill_steps=FLAGS.prefill_steps, drafts=generation.drafts(loaded[1], FLAGS), out=out,
        )  # fmt: skip
    elif FLAGS.quantize is not None:
        kinds = list(dict.fromkeys(FLAGS.quantize))
        written = compare_quantized(loaded, kinds, steps, options, source=source, step=step, out=out)
    elif FLAGS.baseline is not None:
        other = sources.found(FLAGS.baseline)
        written = compare_with_baseline(
            loaded, pretrained.load(other, adjust=_with_dtype, with_profile=False), steps, options, source=source,
            step=step, name=FLAGS.baseline, baseline_source=other, baseline_step=sources.updates_of(other), out=out,
        )  # fmt: skip
    else:
        written = compare(loaded, steps, options, source=source, step=step, out=out, adjust=_with_options)
    print(f"written to {written}")

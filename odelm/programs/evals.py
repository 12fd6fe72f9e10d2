"""Scores a model on zero-shot tasks from local files, at several step counts.

    python -m odelm.evals --model=runs/tiny --tasks=lambada,blimp --data=DIR [--steps=12,6,3] [--out=DIR]
    python -m odelm.evals --model=FOLDER --tasks=DIR/lambada_test.jsonl,own.jsonl --steps=12,3

The model is a training run, a bundle or a Hugging Face folder. A task is a name, whose files are in --data, a file or a
folder of files. Decoders take LAMBADA (lambada), BLiMP (blimp), HellaSwag (hellaswag), PIQA (piqa), ARC (arc, or
arc_easy and arc_challenge), WikiText-2 (wikitext2), and JSON lines of your own: `{"query", "choices", "label"}`, or
`{"text"}` whose last word is to be predicted. Encoders take BLiMP. docs/tasks.md has the formats and the metrics.

The results are printed and written to `results.json` and `results.png` in --out, by default `evals/` in the run or
folder.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from odelm.config import Config, default_steps
from odelm.errors import InputError
from odelm.files import is_url
from odelm.programs import command_line, sources

FLAGS = command_line.new_flags()
_string, _integer, _list = (
    partial(define, flag_values=FLAGS) for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_list)
)
_string("model", None, "A training run, a bundle or a Hugging Face folder.")
_list("tasks", None, "Names of tasks, files or folders.")
_string("data", ".", "The folder that has a folder for each named task: lambada/, blimp/, hellaswag/, ...")
_list("steps", None, "Numbers of depth steps; default: full depth, 1/2, 1/3 and 1/4 of it.")
_string("out", None, "Directory of the results; default: evals/ in the run or folder.")
flags.DEFINE_boolean("overwrite", False, "Replace the results that are in --out.", flag_values=FLAGS)
_integer("limit", None, "Items of each file, from its beginning; default: all.", lower_bound=1)
_string("solver", "euler", "Name of the ODE solver.")
_string("dtype", "auto", "Of matrix products: auto, float32, bfloat16 or float16.")
_integer("batch_size", 32, "Texts of 128 tokens in a batch; of longer ones fewer, of shorter ones more.", lower_bound=1)
_integer(
    "length", None, "Tokens a text of the batch that is timed; default: 128, or the model's positions.", lower_bound=1
)
_integer("repeats", 10, "Timed batches at each step count.", lower_bound=1)
RESULTS = "results"
LENGTH = 128


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 2 for a mistake."""
    less_memory = "try a smaller --batch_size or --length, or a device with more memory"
    return command_line.run(_evaluate, FLAGS, arguments, __doc__ or "", less_memory=less_memory)


def _evaluate() -> int:
    for name, what in dict(model="a run, a bundle or a folder", tasks="names or files").items():
        if not FLAGS[name].value:
            raise InputError(f"--{name} is missing: give {what}")
    steps, out = _steps(), _out()
    # Mistakes in what was given come before what takes long: reading tasks, loading the model, scoring.
    from odelm.evals.tasks.find import find_tasks

    tasks = find_tasks(FLAGS.tasks, Path(FLAGS.data).expanduser(), limit=FLAGS.limit)

    from odelm.evals.likelihood import Scorer
    from odelm.evals.report import publish
    from odelm.evals.tasks.evaluate import check_kinds, evaluate, time_batches
    from odelm.evals.tasks.report import make_results, plot_results, print_results

    (model, config, tokenizer), updates = _load()
    scorer = Scorer(
        model, tokenizer, steps=steps or default_steps(config.model), solver=FLAGS.solver,
        batch_size=FLAGS.batch_size, end_token=config.data.end_token,
    )  # fmt: skip
    check_kinds(scorer, tasks)
    length = _length(config)
    rows = evaluate(scorer, tasks)
    latencies = time_batches(scorer, length, repeats=FLAGS.repeats)
    results = make_results(
        config.model, rows, latencies, source=FLAGS.model, files={task.name: task.source for task in tasks},
        batch=FLAGS.batch_size, length=length, updates=updates,
    )  # fmt: skip
    width = 60 + max(len(task.name) for task in tasks) + 20 * len(latencies)
    publish(results, out, name=RESULTS, draw=plot_results, show=print_results, width=width, quality="value")
    print(f"written to {out}")
    return 0


def _load() -> tuple[Any, int | None]:
    """Returns what `odelm.load` does, and for how many updates the model was trained, if that is known."""
    from odelm import bundle, pretrained

    source = sources.found(FLAGS.model)
    updates = sources.updates_of(source)
    step = None if bundle.is_bundle(source) else updates
    return pretrained.load(source, step=step, adjust=_with_dtype, with_profile=False), updates


def _steps() -> tuple[int, ...] | None:
    """Returns the step counts; None if they are not given."""
    if FLAGS.steps is None:
        return None
    try:
        counts = tuple(int(count) for count in FLAGS.steps)
    except ValueError:
        counts = ()
    if not counts:
        raise InputError(f"--steps is {','.join(FLAGS.steps)!r}, expected whole numbers such as 12,6,3")
    return counts


def _out() -> Path:
    """Returns the directory of the results; InputError if it has some that are not to be replaced."""
    from odelm import shipped
    from odelm.evals.report import check_out

    model = shipped.found(FLAGS.model)
    if FLAGS.out is None and (is_url(FLAGS.model) or not model.is_dir()):
        raise InputError(
            f"{FLAGS.model} is not a directory here: give a training run, a bundle or a Hugging Face folder, or --out "
            "for the results of a model that is elsewhere"
        )
    out = Path(FLAGS.out).expanduser() if FLAGS.out else (shipped.reports(model) or model) / "evals"
    file = out / f"{RESULTS}.json"
    if file.exists() and not FLAGS.overwrite:
        raise InputError(f"{file} is there already: give another --out, or --overwrite to replace it")
    return check_out(out)


def _length(config: Config) -> int:
    limit = config.model.max_length
    length = min(LENGTH, limit) if FLAGS.length is None else FLAGS.length
    if length > limit:
        raise InputError(f"--length is {length}, past the model's {limit} positions; try --length={limit}")
    return length


def _with_dtype(config: Config) -> Config:
    model = dataclasses.replace(config.model, dtype=FLAGS.dtype, residual_dtype="auto")
    return dataclasses.replace(config, model=model)

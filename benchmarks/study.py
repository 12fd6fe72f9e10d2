"""The study of docs/study.md: one row after the other is trained, measured and written down as JSON.

    python -m benchmarks.study --source=TEXT --rows=unshared,random,best [--seeds=3] [--work=DIR] [--out=docs/study]
    python -m benchmarks.study --source=TEXT --rows=best --tune
    python -m benchmarks.study_times docs/study
    python -m benchmarks.study_report docs/study

A row is a recipe (`benchmarks.study_rows`): a base with some options changed, trained by `odelm`'s own trainer in
`--work`, so that the same command resumes a call that was stopped. The learning rates of a row are those of the base
times a factor of `--rates`, or past them, the one whose trial of `--trial` updates with the first seed reached the
lowest held-out loss, averaged over the counts that the row is trained with; every row is tuned, the unshared ones
too, but for those of `TUNED_AS`. A trial is a quarter of `--updates` by default: much shorter ones choose rates that
are too high (docs/study.md). The second command makes the trials alone; of different rows several processes can do it
beside each other. `--rate=2` takes that factor without any.

`--out` gets a file for each row's trials, and one for each row and seed: the options, parameters, the held-out losses
against tokens, jumps of the loss, the losses at each number of evaluations, for the first seed also with matrices of 8
bits (`--quantize`) and the scores of `--tasks`, whose files are in `--data`, and what the trained field looks like
(`benchmarks.trained_field`). What is in `--out` already is left alone.
Several processes can make different rows beside each other on one card (three of the study's size in 140 GB): what a
training and a pass take is measured afterwards, by `benchmarks.study_times`, with the card to itself.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax

import odelm
from benchmarks import run_program
from benchmarks.options import one_of, positive, several, whole
from benchmarks.study_measures import curve_of, measured, records_of, scored, stability_of
from benchmarks.study_rows import ROWS, SHAPES, TUNED_AS, base
from benchmarks.trained_field import field_of
from odelm.config import Config, changed_options, from_json, replace, to_json
from odelm.errors import Diverged, InputError, RunFailure
from odelm.evals.tasks.find import find_tasks
from odelm.files import write_text
from odelm.infer.quantized import KINDS
from odelm.models.parameters import parameters
from odelm.programs.command_line import use_compilation_cache
from odelm.train.run import train

Record = dict[str, Any]
Trials = dict[str, float | None]
"""The loss at each factor of the rates; None where training diverged."""
ELSEWHERE = frozenset({"data.source", "data.data_dir", "train.teacher"})
"""Options that say where files are: they may differ between the seeds of a row."""


def config_of(row: str, options: argparse.Namespace, *, rate: float, seed: int, updates: int) -> Config:
    """Returns the config of a row at a factor of its rates."""
    changed = dict(SHAPES[options.shape])
    if options.shape == "study":
        changed |= ROWS[row]
    else:
        sizes = ("width", "heads", "length", "batch_size")
        changed |= {name: value for name, value in ROWS[row].items() if not name.endswith(sizes)}
    config = base(options.source, updates)
    if changed.get("model.groups") == -1:
        changed["model.groups"] = config.model.depth
    changed["train.updates"] = round(updates * changed.get("train.updates", 1))
    if "train.teacher" in changed:
        changed["train.teacher"] = str(options.work / f"{changed['train.teacher']}_0")
    config = replace(config, changed | {"train.seed": seed})
    if options.data_dir:
        config = replace(config, {"data.data_dir": options.data_dir})
    optimizer = dataclasses.replace(
        config.optimizer,
        learning_rate=rate * config.optimizer.learning_rate,
        muon_learning_rate=rate * config.optimizer.muon_learning_rate,
        warmup=min(config.optimizer.warmup, config.train.updates // 5),
    )
    every = max(config.train.updates // 10, 1)
    run = dataclasses.replace(config.train, eval_every=every, checkpoint_every=5 * every)
    return dataclasses.replace(config, optimizer=optimizer, train=run).validate()


def tuned_rate(row: str, options: argparse.Namespace) -> tuple[float, Trials]:
    """Returns the best factor of the rates, and the loss that each reached in a short trial with the first seed; with
    `--rate` that one and no losses.

    Where the best is the lowest or the highest of them, half or twice of it is tried too. The losses are kept in
    `--out`.
    """
    if options.rate is not None:
        return options.rate, {}
    row = TUNED_AS.get(row, row)
    kept = options.out / f"{row}_rates_{options.trial}.json"
    losses: Trials = json.loads(kept.read_text()) if kept.exists() else {}
    while untried := [rate for rate in options.rates if f"{rate:g}" not in losses] or beyond(losses):
        losses[f"{untried[0]:g}"] = trial_loss(row, options, untried[0])
        write_text(kept, json.dumps(losses, indent=1) + "\n")
    return _best(losses), losses


def check_made(row: str, rate: float | None, options: argparse.Namespace) -> None:
    """Raises InputError if `--out` has a seed of the row that was trained otherwise: with another rate, if one is
    given, for another number of updates, or with any other option that is not in `ELSEWHERE`."""
    for seed in range(options.seeds):
        file = options.out / f"{row}_{seed}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        if rate is not None and found["rate"] != rate:
            raise InputError(
                f"{file} has the factor {found['rate']:g}, not {rate:g}: remove it, give another --out, or "
                f"--rate={found['rate']:g}"
            )
        wanted = config_of(row, options, rate=found["rate"], seed=seed, updates=options.updates)
        if changed := changed_options(from_json(json.dumps(found["config"])), wanted, ELSEWHERE):
            raise InputError(
                f"{file} was trained otherwise ({', '.join(changed)}): remove it, give another --out, or the options "
                "that it had"
            )


def trial_loss(row: str, options: argparse.Namespace, rate: float) -> float | None:
    """Returns the held-out loss of a trial, the mean over the counts that it is trained with; None if it diverged."""
    config = config_of(row, options, rate=rate, seed=0, updates=options.trial)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, eval_every=options.trial, checkpoint_every=options.trial)
    )
    try:
        result = train(config, options.work / f"{row}_trial_{options.trial}_{rate:g}")
    except Diverged:
        return None
    if result.interrupted:
        raise SystemExit(128 + result.signal)
    trained = [result.losses[count] for count in config.trained_counts if count in result.losses]
    loss = sum(trained) / len(trained)
    return loss if math.isfinite(loss) else None


def beyond(losses: Trials) -> list[float]:
    """Returns the factor past the end of those tried if the best is at an end, else nothing."""
    best, tried = _best(losses), sorted(float(rate) for rate in losses)
    return [2 * best] if best == tried[-1] else [best / 2] if best == tried[0] else []


def _best(losses: Trials) -> float:
    known = {float(rate): loss for rate, loss in losses.items() if loss is not None}
    if not known:
        raise RunFailure(f"every trial diverged, at the factors {', '.join(losses)}: give lower --rates")
    return min(known, key=lambda rate: known[rate])


def run_row(row: str, seed: int, rate: float, trials: Trials, options: argparse.Namespace) -> Record:
    """Trains a row with one seed and returns what docs/study.md says of it."""
    config = config_of(row, options, rate=rate, seed=seed, updates=options.updates)
    workdir = options.work / f"{row}_{seed}"
    result = train(config, workdir)
    if result.interrupted:
        raise SystemExit(128 + result.signal)
    model = odelm.load(workdir)[0]
    return {
        "row": row,
        "seed": seed,
        "options": ROWS[row],
        "rate": rate,
        "trials": trials,
        "parameters": sum(array.size for array in parameters(model).values()),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "curve": curve_of(records_of(workdir)),
        "stability": stability_of(records_of(workdir)),
        "evaluations": measured(workdir, config, result.step, options.quantize if seed == 0 else ()),
        "field": field_of(workdir),
        "tasks": [],
        "config": json.loads(to_json(config)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="text: a file, folder or glob, as of data.corpus=text")
    parser.add_argument(
        "--rows", type=several(one_of(ROWS)), required=True, help=f"several as A,B, of {', '.join(ROWS)}"
    )
    parser.add_argument("--seeds", type=whole, default=1)
    parser.add_argument("--rates", default=[0.5, 1.0, 2.0], type=several(positive))
    parser.add_argument("--rate", type=positive, help="the factor, without trials")
    parser.add_argument("--updates", type=whole, default=3052, help="of 65,536 tokens: 200 M of them")
    parser.add_argument("--trial", type=whole, help="updates of a trial of a rate; default: a quarter of --updates")
    parser.add_argument("--tune", action="store_true", help="makes the trials of the rates and nothing else")
    parser.add_argument("--tasks", default=[], type=several(str), help="as of python -m odelm.evals")
    parser.add_argument("--data", type=Path, default=Path(), help="the folder of the tasks' files")
    kinds = [kind.name for kind in KINDS.values() if kind.inputs != "static"]
    parser.add_argument(
        "--quantize", default=[], type=several(one_of(kinds)), help=f"measure losses with these too: {', '.join(kinds)}"
    )
    parser.add_argument("--shape", choices=SHAPES, default="study", help="tiny: to see that it runs")
    parser.add_argument("--data_dir", default="", help="where prepared text is kept, in place of the usual place")
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=Path("docs/study"))
    options = parser.parse_args()
    if options.tune and options.rate is not None:
        parser.error("--tune makes trials, --rate leaves them out: give one of them")
    if options.trial is None:
        options.trial = max(options.updates // 4, 1)
    use_compilation_cache("~/.cache/odelm/compiled")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tasks:
        find_tasks(options.tasks, options.data)  # its errors come before hours of training
    for row in options.rows:
        if options.tune:
            print(f"{row}: {tuned_rate(row, options)[1]}", flush=True)
        else:
            make_files(row, options)
    return 0


def make_files(row: str, options: argparse.Namespace) -> None:
    """Writes the files of a row's seeds that are not there, and then the scores that are missing of the first."""
    files = [options.out / f"{row}_{seed}.json" for seed in range(options.seeds)]
    missing = [seed for seed, file in enumerate(files) if not file.exists()]
    check_made(row, options.rate, options)
    if len(missing) < len(files):
        print(f"{row}: {', '.join(file.name for file in files if file.exists())} in {options.out} already", flush=True)
    if missing:
        rate, trials = tuned_rate(row, options)
        check_made(row, rate, options)
        for seed in missing:
            found = run_row(row, seed, rate, trials, options)
            write_text(files[seed], json.dumps(found, indent=1) + "\n")
            print(f"{row}, seed {seed}: {found['curve'][-1]}", flush=True)
    if options.tasks:
        add_scores(row, options)


def add_scores(row: str, options: argparse.Namespace) -> None:
    """Adds the scores of `--tasks` to the file of the first seed, if it has none; scores of other tasks stay alone.

    The file is written before scoring, so that nothing is trained again if the call is stopped during it.
    """
    file, workdir = options.out / f"{row}_0.json", options.work / f"{row}_0"
    found = json.loads(file.read_text())
    if found["tasks"]:
        return
    if not workdir.exists():
        print(f"{file} has no scores, and the run {workdir} is not there to score", flush=True)
        return
    scores = scored(workdir, options.tasks, options.data)
    if not scores:
        names = ", ".join(options.tasks)
        print(f"{row}: encoders score sentence pairs alone, such as blimp; {names} has none", flush=True)
    write_text(file, json.dumps(found | {"tasks": scores}, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)

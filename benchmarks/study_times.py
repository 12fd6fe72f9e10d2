"""What the rows of docs/study.md take, measured one after the other with nothing else on the card.

    python -m benchmarks.study_times docs/study [--rows=unshared,random] [--repeats=15]

The rows are those that have a file of their first seed; the text must be where the files say. Of each row, the update
is timed at every count of steps that it is trained with (the median of means over 5 updates in a row, `--updates` in
all), and a pass over 32 rows at every number of evaluations that its file has a loss for; the passes of all rows take
turns. Weights are fresh, since no time depends on them. `FOLDER/times.json` gets the seconds of each, and keeps those
of rows that other calls measured on the same kind of card with the same jax; with another it is an error. The seconds
of a training are those of its updates at the counts that it drew, without compiling and evaluating.
"""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from benchmarks import run_program
from benchmarks.options import several, whole
from benchmarks.training import median_of
from odelm.config import Config, from_json
from odelm.data.loader import train_batches
from odelm.data.prepare import prepare
from odelm.errors import InputError
from odelm.evals.sweep import latencies_of, make_calls, settings
from odelm.files import write_text
from odelm.infer.runner import Runner
from odelm.models import create
from odelm.ode import grid
from odelm.programs.command_line import use_compilation_cache
from odelm.sharding import make_mesh, place_batch
from odelm.train.draws import draw_grid
from odelm.train.optimizer import make_optimizer
from odelm.train.step import compile_updates, graph_of, init_state, make_update
from odelm.train.teacher import load_teacher

TIMES = "times.json"
BATCH = 32
CALLS = 5
"""Updates in a row, whose mean time is one measurement: an update is handed over while the one before it runs."""
Record = dict[str, Any]


def update_seconds(config: Config, *, updates: int) -> dict[int, float]:
    """Returns the median seconds of an update at each count of steps that the config may draw."""
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.updates, config.model)
    graph, _ = graph_of(config)
    prepared = prepare(config)
    teacher = load_teacher(config, prepared.tokenizer, mesh)
    state = dataclasses.replace(init_state(config, optimizer, mesh), teacher=teacher)
    batch = place_batch(next(iter(train_batches(prepared, config))), mesh)
    compiled = compile_updates(make_update(config, graph, optimizer), state, batch, config.trained_counts, mesh, print)
    box: list[Any] = [state, {"loss": None}]

    def run(count: int) -> None:
        box[:] = compiled[count](box[0], batch, grid.equal(config.model.core, count))

    def wait() -> None:
        jax.block_until_ready(box[1])

    found = {}
    for count in compiled:
        run(count)
        found[count] = median_of(partial(run, count), wait, calls=CALLS, repeats=max(updates // CALLS, 1))
    return found


def training_seconds(config: Config, seconds: dict[int, float], updates: int) -> float:
    """Returns the seconds of the first `updates` of a training, given those of an update at each count."""
    return sum(seconds[len(draw_grid(config, update)) - 1] for update in range(updates))


def pass_seconds(configs: dict[str, tuple[Config, tuple[int, ...]]], *, repeats: int) -> dict[str, dict[int, float]]:
    """Returns the median seconds of a pass over (BATCH, length) tokens at each number of steps of each row."""
    calls: dict[tuple[str, int], Any] = {}
    for row, (config, counts) in configs.items():
        runner = Runner.of(create(config.model, rngs=nnx.Rngs(0)))
        forward = make_calls(runner, settings(runner, counts), batch=BATCH, length=config.train.length)
        calls |= {(row, setting.steps): call for setting, call in forward.items() if setting.steps is not None}
    found: dict[str, dict[int, float]] = {row: {} for row in configs}
    for (row, count), latency in latencies_of(calls, repeats).items():
        found[row][count] = latency.median / 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=several(str), help="names of files without _0.json; default: all")
    parser.add_argument("--updates", type=whole, default=15)
    parser.add_argument("--repeats", type=whole, default=15)
    options = parser.parse_args()
    use_compilation_cache("~/.cache/odelm/compiled")
    files = {file.stem.removesuffix("_0"): file for file in sorted(options.folder.glob("*_0.json"))}
    files = {row: file for row, file in files.items() if "_rates_" not in file.stem}
    if not files:
        raise InputError(f"{options.folder} has no results of benchmarks.study")
    if unknown := [row for row in options.rows or () if row not in files]:
        raise InputError(f"{options.folder} has no {unknown[0]}_0.json; it has {', '.join(files)}")
    configs: dict[str, tuple[Config, tuple[int, ...]]] = {}
    for row in options.rows or files:
        record = json.loads(files[row].read_text())
        config = from_json(json.dumps(record["config"]))
        configs[row] = config, tuple(measured["steps"] for measured in record["evaluations"])
    times = former(options.folder / TIMES)
    passes = pass_seconds(configs, repeats=options.repeats)
    for row, (config, _) in configs.items():
        times["rows"][row] = {"update_s": update_seconds(config, updates=options.updates), "pass_s": passes[row]}
        print(f"{row}: {json.dumps(times['rows'][row])}", flush=True)
        write_text(options.folder / TIMES, json.dumps(times, indent=1) + "\n")


def former(file: Path) -> Record:
    """Returns what the file has, InputError if it is of another card or jax."""
    here = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    found = json.loads(file.read_text()) if file.exists() else {}
    if found and not here.items() <= found.items():
        raise InputError(
            f"{file} is of {found['device']} and jax {found['jax']}, not of {here['device']} and jax {here['jax']}: "
            "move it away to measure all rows here"
        )
    return found or here | {"rows": {}}


if __name__ == "__main__":
    run_program(main)

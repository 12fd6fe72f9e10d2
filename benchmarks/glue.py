"""An encoder fine-tuned on every task of GLUE that is at hand, several seeds each: one table of all step counts.

    python -m benchmarks.glue --model=small-encoder --data=GLUE --work=runs/glue --out=glue.json

Each task is `train.py --config=configs/glue.py --seeds=...` in a process, `--beside` of them at once, for `--epochs`
epochs but at most `--updates` updates. Tasks that have ended are not trained again, and one that was interrupted goes
on. If a task fails, the others are still made, and the status is 1. What follows `--` goes to every task:
`-- --config.train.length=64`.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import run_program
from benchmarks.options import one_of, several, whole
from odelm.config import TASKS, DataConfig
from odelm.data.glue import read_task, task_folder
from odelm.evals.seeds import RESULTS, spread_text

ROOT = Path(__file__).parents[1]


def command_of(task: str, options: argparse.Namespace) -> list[str]:
    """Returns the command that fine-tunes on a task."""
    data = DataConfig(task=task, source=str(options.data))
    if not (task_folder(data) / "train.tsv").exists():  # some copies of QNLI lack it
        data = dataclasses.replace(data, train_share=0.8)
    examples = len(read_task(data)[0].targets)
    updates = max(1, min(options.updates, round(options.epochs * examples / options.batch_size)))
    given = {
        "data.task": task, "data.source": options.data, "data.train_share": data.train_share,
        "data.data_dir": options.work / "data", "init.from_pretrained": options.model, "train.updates": updates,
        "train.batch_size": options.batch_size, "train.eval_every": updates, "train.checkpoint_every": 500,
        "optimizer.warmup": max(updates // 10, 1),
    }  # fmt: skip
    return [
        sys.executable, "train.py", "--config=configs/glue.py", f"--workdir={options.work / task}",
        f"--seeds={options.seeds}", *(f"--config.{name}={value}" for name, value in given.items()), *options.more,
    ]  # fmt: skip


def run_all(tasks: list[str], options: argparse.Namespace) -> list[str]:
    """Runs the tasks that have no results yet, so many beside each other, prints how each has ended, and returns those
    that failed."""
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / options.beside:.2f}"}
    waiting = [task for task in tasks if not (options.work / task / f"{RESULTS}.json").exists()]
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    failed = []
    options.work.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and len(running) < options.beside:
            task = waiting.pop(0)
            with (options.work / f"{task}.log").open("ab") as log:
                process = subprocess.Popen(
                    command_of(task, options), cwd=ROOT, env=os.environ | share, stdout=log, stderr=log
                )
            running[task] = process, time.perf_counter()
        for task, (process, start) in list(running.items()):
            if process.poll() is not None:
                del running[task]
                print(f"{task}: status {process.returncode} after {time.perf_counter() - start:.0f} s", flush=True)
                failed += [task] if process.returncode else []
        time.sleep(0.5)
    return failed


def table(tasks: list[str], work: Path) -> dict[str, Any]:
    """Prints a table of the tasks that have ended, a column for each step count, and returns all their rows."""
    found = {}
    for task in tasks:
        path = work / task / f"{RESULTS}.json"
        if path.exists():
            found[task] = json.loads(path.read_text())
    for task, results in found.items():
        for metric in dict.fromkeys(row["metric"] for row in results["rows"]):
            rows = [row for row in results["rows"] if row["metric"] == metric]
            cells = [f"{row['steps']}: {spread_text(row)}" for row in rows]
            beside = "" if rows[0]["majority"] is None else f" (majority {100 * rows[0]['majority']:.1f})"
            print(f"  {task:6} {metric:9} {'  '.join(cells)}{beside}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small-encoder", help="a run, a bundle, a Hugging Face folder or a name")
    parser.add_argument("--data", type=Path, required=True, help="the folder that has the folders of the tasks")
    parser.add_argument("--work", type=Path, required=True, help="where the runs go, and are resumed")
    parser.add_argument("--tasks", type=several(one_of(TASKS)), default=",".join(TASKS), help="which of them: A,B")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--updates", type=whole, default=2000, help="the most updates of a task")
    parser.add_argument("--batch_size", type=whole, default=32)
    parser.add_argument("--beside", type=whole, default=1, help="tasks that are trained beside each other")
    parser.add_argument("--out", type=Path, help="where to write all results as JSON")
    parser.add_argument("more", nargs="*", help="after --, options of every task")
    options = parser.parse_args()
    options.work, options.data = options.work.absolute(), options.data.absolute()
    failed = run_all(options.tasks, options)
    results = table(options.tasks, options.work)
    if options.out:
        options.out.write_text(json.dumps(results) + "\n")
    for task in failed:
        print(f"{task} failed: see {options.work / task}.log", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    run_program(main)

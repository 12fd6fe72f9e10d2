"""A run that is killed twenty times, in saves, evaluations and elsewhere, ends where the undisturbed one ends."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from odelm.checkpoint import AVERAGE
from odelm.checkpoint_files import CheckpointFiles
from odelm.manifest import is_sealed
from odelm.run_directory import CHECKPOINTS
from odelm.train.log import METRICS

ROOT = Path(__file__).parents[2]
KILLS, UPDATES, EVAL_EVERY = 20, 240, 6
MOMENTS = {"saving", "evaluating", "elsewhere"}
TIMES = ("tokens_per_s", "data_wait")
"""What is measured, and differs from run to run."""
OPTIONS = {
    "data.corpus": "text", "data.valid_fraction": 0.1, "model.vocab_size": 300, "model.width": 32, "model.heads": 2,
    "model.depth": 4, "model.max_length": 32, "model.dropout": 0.1, "step_sampling.counts": "2,4", "train.length": 16,
    "train.batch_size": 4, "train.updates": UPDATES, "train.eval_batches": 8, "train.eval_every": EVAL_EVERY,
    "train.checkpoint_every": 4, "train.log_every": 3, "train.unroll": "false", "optimizer.average": 0.9,
}  # fmt: skip

pytestmark = pytest.mark.kills


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Returns a folder for the prepared data and the compiled programs of all runs."""
    return tmp_path_factory.mktemp("cache")


def start(workdir: Path, corpus: Path, cache: Path) -> subprocess.Popen[str]:
    options = OPTIONS | {"data.source": corpus, "data.data_dir": cache / "data"}
    command = [
        sys.executable,
        "train.py",
        "--config=tiny",
        f"--workdir={workdir}",
        f"--compilation_cache={cache / 'xla'}",
    ]
    command += [f"--config.{name}={value}" for name, value in options.items()]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(workdir: Path, corpus: Path, cache: Path) -> str:
    process = start(workdir, corpus, cache)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def kill(workdir: Path, corpus: Path, cache: Path, event: str, after: float) -> set[str]:
    """Kills a run some seconds after its first update, before its first evaluation or after its first save.

    Returns what it was doing. A run prints a line for the update before an evaluation, and another after it.
    """
    saved, seen = newest(workdir), [""]
    events = {
        "update": lambda: seen[-1].startswith("update "),
        "evaluation": lambda: evaluated_after(seen[-1]) is not None,
        "save": lambda: newest(workdir) > saved,
    }
    process = start(workdir, corpus, cache)
    assert process.stdout is not None
    while not events[event]():
        seen.append(process.stdout.readline())
        assert seen[-1], f"the run ended before its kill: {''.join(seen)}"
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)
    seen += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL, "".join(seen)
    names = [path.name for path in (workdir / CHECKPOINTS).iterdir()]
    unsealed = [name for name in names if not name.isdecimal() or not is_sealed(workdir / CHECKPOINTS / name)]
    doing = {"saving"} if unsealed else set()
    # The update is recorded before the evaluation begins.
    if (step := evaluated_after(seen[-1])) and f'\n{{"step": {step}, ' in (workdir / METRICS).read_text():
        doing.add("evaluating")
    return doing or {"elsewhere"}


def newest(workdir: Path) -> int:
    """Returns the step of the newest checkpoint that is complete, 0 if there is none."""
    return max(CheckpointFiles(workdir).steps(), default=0)


def evaluated_after(line: str) -> int | None:
    """Returns the update that a line reports, if an evaluation on the way is due after it."""
    found = re.match(rf"update (\d+)/{UPDATES}: loss", line)
    step = int(found[1]) if found else 0
    return step if step and step < UPDATES and step % EVAL_EVERY == 0 else None


def arrays_of(workdir: Path, step: int) -> list[np.ndarray]:
    """Returns every array of a checkpoint: parameters, their mean, and the state of the optimiser."""
    import jax

    with ocp.StandardCheckpointer() as checkpointer:
        folder = (workdir / CHECKPOINTS / str(step)).absolute()
        items = [checkpointer.restore(folder / name) for name in ("params", AVERAGE, "optimizer")]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(items)]


def records_of(workdir: Path) -> list[dict]:
    records = [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def test_killed_runs_end_where_the_undisturbed_one_does(corpus, cache, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, corpus, cache)
    drawn = random.Random(0)
    seen: list[set[str]] = []
    while len(seen) < KILLS or set().union(*seen) != MOMENTS:
        assert len(seen) < 2 * KILLS, f"no kill hit some of the moments: {seen}"
        match len(seen) % 5:
            case 4:
                # The first evaluation of a process takes longer than this: it traces and compiles.
                event, after = "evaluation", 0.05
            case 1 | 3:
                event, after = "save", drawn.uniform(0, 0.3)
            case _:
                # Where the disk is slow a run is always saving, but for the time between its first line and its first
                # save; where processors are busy, its first save may come late.
                event, after = "update", drawn.uniform(0, drawn.choice((0.0, 0.3, 2.0)))
        seen.append(kill(killed, corpus, cache, event, after))
    saved = newest(killed)
    assert 0 < saved < UPDATES, f"the kills left a run that was saved after {saved} of {UPDATES} updates"
    assert f"resumed after update {saved}\n" in finish(killed, corpus, cache)
    print("kills:", seen)
    assert records_of(killed) == records_of(whole)
    pairs = list(zip(arrays_of(killed, UPDATES), arrays_of(whole, UPDATES), strict=True))
    assert len(pairs) > 20
    for left, right in pairs:
        np.testing.assert_array_equal(left, right)


def test_a_second_process_in_the_same_directory_is_refused(corpus, cache, tmp_path):
    first = start(tmp_path / "run", corpus, cache)
    assert first.stdout is not None
    while not (line := first.stdout.readline()).startswith("update "):
        assert line, "the run ended before its first update"
    # It stays where it is, with its lock.
    first.send_signal(signal.SIGSTOP)
    second = start(tmp_path / "run", corpus, cache)
    try:
        told, _ = second.communicate(timeout=120)
    finally:
        for process in (first, second):
            process.kill()
        first.communicate()
    assert second.returncode == 2, told
    wanted = (
        f"error: another process trains in {tmp_path / 'run'}; wait for its end, stop it, or give another --workdir"
    )
    assert told.splitlines() == [wanted]

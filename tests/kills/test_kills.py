"""A run that is killed twenty times, at moments that nothing chose, ends where the one that was left alone ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from odelm.checkpoint import Checkpoints
from odelm.manifest import is_sealed
from odelm.run_directory import CHECKPOINTS
from odelm.train.log import METRICS

ROOT = Path(__file__).parents[2]
KILLS, UPDATES = 20, 240
TIMES = ("tokens_per_s", "data_wait")
"""What is measured, and differs from run to run."""
OPTIONS = {
    "data.corpus": "text", "data.valid_fraction": 0.1, "model.vocab_size": 300, "model.width": 32, "model.heads": 2,
    "model.depth": 4, "model.max_length": 32, "model.dropout": 0.1, "step_sampling.counts": "2,4", "train.length": 16,
    "train.batch_size": 4, "train.updates": UPDATES, "train.eval_batches": 8, "train.eval_every": 6,
    "train.checkpoint_every": 4, "train.log_every": 3, "train.unroll": "false",
}  # fmt: skip

pytestmark = pytest.mark.kills


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


def kill(workdir: Path, corpus: Path, cache: Path, after: float) -> str:
    """Kills a run some seconds after its first update, and returns what it was seen to do then."""
    process = start(workdir, corpus, cache)
    assert process.stdout is not None
    seen: list[str] = []
    while not seen or not seen[-1].startswith("update "):
        seen.append(process.stdout.readline())
        assert seen[-1], f"the run ended before its first update: {''.join(seen)}"
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)
    seen += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL, "".join(seen)
    names = [path.name for path in (workdir / CHECKPOINTS).iterdir()]
    unsealed = [name for name in names if not name.isdecimal() or not is_sealed(workdir / CHECKPOINTS / name)]
    return "saving" if unsealed else "elsewhere"


def arrays_of(workdir: Path, step: int) -> list[np.ndarray]:
    """Returns every array of a checkpoint: parameters, and the state of the optimiser."""
    import jax

    with ocp.StandardCheckpointer() as checkpointer:
        folder = (workdir / CHECKPOINTS / str(step)).absolute()
        items = [checkpointer.restore(folder / name) for name in ("params", "optimizer")]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(items)]


def records_of(workdir: Path) -> list[dict]:
    records = [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def test_killed_runs_end_where_the_undisturbed_one_does(corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, corpus, tmp_path)
    drawn = random.Random(0)
    seen: list[str] = []
    while len(seen) < KILLS or len(set(seen)) < 2:
        assert len(seen) < 2 * KILLS, f"all kills hit one moment: {seen}"
        # Where the disk is slow a run is always saving, but for the time between its first line and its first save;
        # where processors are busy, its first save may come late.
        seen.append(kill(killed, corpus, tmp_path, drawn.uniform(0, drawn.choice((0.0, 0.3, 2.0)))))
    assert max(Checkpoints(killed, read_only=True).steps(), default=0) < UPDATES, "the run ended before its last kill"
    finish(killed, corpus, tmp_path)
    print("kills:", seen)
    assert records_of(killed) == records_of(whole)
    pairs = list(zip(arrays_of(killed, UPDATES), arrays_of(whole, UPDATES), strict=True))
    assert len(pairs) > 20
    for left, right in pairs:
        np.testing.assert_array_equal(left, right)

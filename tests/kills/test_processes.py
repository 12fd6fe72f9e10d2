"""Two processes of two devices each train as one device does, and stop, fail and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import odelm
from odelm.checkpoint import Checkpoints
from odelm.train.log import METRICS
from tests.kills.test_kills import OPTIONS, ROOT

UPDATES = 12
pytestmark = pytest.mark.kills


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(
    workdir: Path, corpus: Path, cache: Path, *, processes: int = 2, own: tuple[str, ...] = ("", ""), **options
) -> list[subprocess.Popen[str]]:
    """Starts the processes of a run, all on this machine, with two devices each; `own` is one more flag of each."""
    changed = {name.replace("__", "."): value for name, value in options.items()}
    values = OPTIONS | {"data.source": corpus, "data.data_dir": cache / "data"}
    values |= {"train.updates": UPDATES, "train.eval_steps": 4, "model.heads": 4} | changed
    command = [sys.executable, "train.py", "--config=tiny", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in values.items()]

    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    }
    port, started = free_port(), []
    for number in range(processes):
        join = ["--distributed", f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
        started.append(
            subprocess.Popen(
                [*command, *join, f"--process_id={number}", *own[number].split()] if processes > 1 else command,
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            )
        )  # fmt: skip
    return started


def wait_for_an_update(processes: list[subprocess.Popen[str]]) -> None:
    """Waits until the first process, which alone prints, reports an update."""
    assert processes[0].stdout is not None
    while not processes[0].stdout.readline().startswith("update "):
        assert processes[0].poll() is None


def ended(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str]]:
    """Returns the status and the output of each process."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def losses_of(workdir: Path) -> list[float]:
    records = [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]
    return [r["loss"] for r in records if "loss" in r] + [x for r in records for x in r.get("eval_loss", {}).values()]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    (status, output), = ended(start(folder / "run", corpus, folder, processes=1, mesh__data=1))  # fmt: skip
    assert status == 0, output
    return folder


@pytest.mark.parametrize("mesh", [(4, 1, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4)])
def test_two_processes_train_as_one_device_does(alone, corpus, tmp_path, mesh):
    """The first two of the four devices are those of the first process; with the last mesh both bring the same rows."""
    axes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    found = ended(start(tmp_path / "run", corpus, alone, **axes))
    assert [status for status, _ in found] == [0, 0], found
    assert "mesh: data {}, fsdp {}, tensor {}\n".format(*mesh) in found[0][1]
    # float32 sums in another order, over 12 updates.
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(alone / "run"), rtol=2e-3)


@pytest.mark.parametrize("which", [0, 1])
def test_a_signal_to_one_process_stops_both_and_the_run_resumes(alone, corpus, tmp_path, which):
    long = dict(train__updates=4000, train__checkpoint_every=1000, train__eval_every=5000)
    processes = start(tmp_path / "run", corpus, alone, **long)
    wait_for_an_update(processes)
    processes[which].send_signal(signal.SIGTERM)
    found = ended(processes)
    assert [status for status, _ in found] == [143, 143], found
    (step,) = Checkpoints(tmp_path / "run", read_only=True).steps()
    assert f"interrupted after update {step}" in found[0][1]
    again = ended(start(tmp_path / "run", corpus, alone, **long | dict(train__updates=step + 4)))
    assert [status for status, _ in again] == [0, 0], again
    assert f"resumed after update {step}" in again[0][1]
    # What several processes have saved, one reads.
    model, _, _ = odelm.load(tmp_path / "run")
    assert np.isfinite(model(np.zeros((1, 4), np.int32))).all()


@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_dies_ends_the_other_within_a_minute(alone, corpus, tmp_path, which):
    long = dict(train__updates=100_000, train__checkpoint_every=1000, train__eval_every=100_000)
    processes = start(tmp_path / "run", corpus, alone, **long)
    wait_for_an_update(processes)
    processes[which].kill()
    since = time.monotonic()
    status, output = ended(processes, timeout=90)[1 - which]
    assert status not in (0, 130, 143) and time.monotonic() - since < 60, output
    assert output.strip(), "it ended without a word"

"""Ctrl-C and SIGTERM while a program imports, prepares, compiles, trains or measures: one line and a status."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts a program as the leader of a process group, as a shell does."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, start_new_session=True, **pipes)


def wait_for(running: subprocess.Popen[str], ready: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end, "the moment did not come"
        time.sleep(0.02)


def wait_for_import(running: subprocess.Popen[str], library: str) -> None:
    """Waits until the program has begun to import a library."""
    wait_for(running, lambda: library in Path(f"/proc/{running.pid}/maps").read_text())


def ends(running: subprocess.Popen[str], number: int, line: str) -> str:
    """Checks that the program ends by a signal as it should, and returns what it had printed."""
    out, told = running.communicate(timeout=60)
    assert running.returncode == 128 + number, told
    assert told.splitlines()[-1] == line
    assert "Traceback" not in told and "Error" not in told and "Warning" not in told, told
    return out


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows what a process has loaded")
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("program", "line"),
    [
        (["train.py", "--config=tiny"], "interrupted; the same command goes on from what was saved"),
        (["infer.py"], "interrupted"),
        (["-m", "odelm.data", "show"], "interrupted; the same command resumes from what is finished"),
        (["-m", "odelm.interop", "export", "--to=nowhere"], "interrupted"),
    ],
    ids=["train", "infer", "data", "interop"],
)
def test_while_it_imports(program, line, number, tmp_path):
    with start(*program, f"--workdir={tmp_path / 'run'}") as running:
        wait_for_import(running, "numpy" if "odelm.data" in program else "jaxlib")
        running.send_signal(number)
        ends(running, number, line)
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
@pytest.mark.parametrize("number", SIGNALS)
def test_while_updates_are_compiled(number, small, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    command = ["--config=tiny", f"--workdir={tmp_path / 'run'}", *small, "--config.train.unroll=true"]
    # Many depth steps take longer to compile than a busy machine may take to send the signal.
    command += ["--config.model.depth=24", "--config.step_sampling.counts=12,24"]
    with start("train.py", *command) as running:
        wait_for(running, lambda: "depth steps drawn" in running.stdout.readline())
        time.sleep(0.3)
        running.send_signal(number)
        out = ends(running, number, "interrupted; the same command goes on from what was saved")
    assert "compiled the updates" not in out
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.thorough
@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_does_not_wait_for_the_checkpoint(number, small, tmp_path):
    endless = [*small, "--config.train.updates=1000000", "--config.train.log_every=1"]
    with start("train.py", "--config=tiny", f"--workdir={tmp_path}", *endless) as running:
        wait_for(running, (tmp_path / "metrics.jsonl").is_file)
        wait_for(running, lambda: '"loss"' in (tmp_path / "metrics.jsonl").read_text())
        running.send_signal(number)
        running.send_signal(SIGNALS[number == SIGNALS[0]])
        out, told = running.communicate(timeout=60)
    assert running.returncode in (128 + SIGNALS[0], 128 + SIGNALS[1])
    assert "Traceback" not in told and "Error" not in told, told
    assert ("interrupted" in told) != ("interrupted after update" in out)


def test_while_workers_prepare(tmp_path):
    command = ["-m", "odelm.data", "prepare", f"--data_dir={tmp_path}", "--vocab_size=400", "--workers=2"]
    with start(*command) as running:
        wait_for(running, lambda: any(tmp_path.rglob(".writing-*")))
        os.killpg(running.pid, signal.SIGINT)
        ends(running, signal.SIGINT, "interrupted; the same command resumes from what is finished")
    with pytest.raises(ProcessLookupError):
        wait_for_end_of(running.pid)


def wait_for_end_of(group: int, seconds: float = 10) -> None:
    """Waits until no process of a group is left, which raises ProcessLookupError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        os.killpg(group, 0)
        time.sleep(0.1)

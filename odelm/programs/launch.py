"""Starts a program, with its signals seen to before anything is imported that takes time."""

import importlib
import sys

from odelm.interrupts import guarded


def train() -> int:
    """Runs `train.py`, which is `odelm-train` where the package is installed."""
    return _launch("train", "interrupted; the same command goes on from what was saved")


def infer() -> int:
    """Runs `infer.py`, which is `odelm-infer` where the package is installed."""
    return _launch("infer", "interrupted")


def data() -> int:
    """Runs `python -m odelm.data`, which is `odelm-data` where the package is installed."""
    return _launch("data", "interrupted; the same command resumes from what is finished")


def interop() -> int:
    """Runs `python -m odelm.interop`."""
    return _launch("interop", "interrupted")


def evals() -> int:
    """Runs `python -m odelm.evals`, which is `odelm-evals` where the package is installed."""
    return _launch("evals", "interrupted")


def harness() -> int:
    """Runs `python -m odelm.evals.harness`, which is lm-eval."""
    return _launch("harness", "interrupted")


def _launch(name: str, line: str) -> int:
    return guarded(lambda: importlib.import_module(f"odelm.programs.{name}").main(sys.argv[1:]), line=line)

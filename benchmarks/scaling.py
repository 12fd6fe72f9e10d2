"""Tokens/s of pre-training on 1, 2, 4, 8 ... devices: shared decoders, meshes of data, fsdp and tensor.

    python -m benchmarks.scaling --out=FILE.json [--models=small,wide] [--meshes=data] [--devices=1,2] [--full]
    python -m benchmarks.scaling --out=FILE.json --report=FILE.md
    python -m benchmarks.scaling --out=FILE.json --predict

The first times the update of each model on each mesh, at each count of steps; "random" is the mean of their times. With
weak scaling each device has a fixed number of rows, with strong scaling the whole batch has. Both are compared with one
device: a smaller mesh has the first devices of the host, in the same kind of process. A case has a process of its own,
and each count is written to `--out` when it is measured: the same command measures what is missing. The second writes
the results as tables and a plot. The third compiles the updates for CPU devices of this machine, runs none, and counts
what would be sent. On several hosts give the same command on each, with the flags of `train.py`; `--out` is then in a
folder that they share, and the case of one device is measured first, on one host.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks import run_program
from benchmarks.options import several, whole
from benchmarks.scaling_case import MESH, MODELS, Case, run_case
from benchmarks.scaling_report import lines_of, write_report
from odelm.errors import InputError
from odelm.files import write_text
from odelm.programs.command_line import use_compilation_cache
from odelm.programs.joining import joined

SCALINGS = ("weak", "strong")
STOPPED = 143
"""The status of a process that SIGTERM ended."""
DISTRIBUTED = ("coordinator", "num_processes", "process_id")
Record = dict[str, Any]


class Results:
    """The measured cases by name, in a file that is written whenever one is added to."""

    def __init__(self, path: Path, settings: Record, *, writes: bool) -> None:
        """Reads what the file has. Raises InputError if it was measured with other settings."""
        self.path, self.writes = path, writes
        self.content: Record = {"settings": settings, "cases": {}}
        if path.exists():
            self.content = json.loads(path.read_text())
            if (former := self.content["settings"]) != settings:
                raise InputError(f"{path} has results of {former}, not of {settings}: give another --out")

    def record(self, case: Case) -> Record:
        """Returns what is known of a case."""
        return self.content["cases"].get(case.name, {})

    def add(self, case: Case, part: Record) -> None:
        """Adds to a case; a count of steps to those that it has."""
        record = self.content["cases"].setdefault(case.name, {})
        record |= part | {"counts": record.get("counts", {}) | part.get("counts", {})}
        if self.writes:
            write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def cases_of(options: argparse.Namespace, devices: list[int]) -> list[Case]:
    """Returns the cases in the order in which they are measured: weak scaling first, data first."""
    found = []
    for scaling in options.scaling.split(","):
        for mesh in options.meshes.split(","):
            for model in options.models.split(","):
                cases = [Case(model, mesh, count, scaling) for count in devices]
                found += [case if case.devices > 1 else case.alone for case in cases]
    patterns = options.cases.split(",")
    return [case for case in dict.fromkeys(found) if any(fnmatch(case.name, pattern) for pattern in patterns)]


def missing(case: Case, record: Record, options: argparse.Namespace) -> tuple[int, ...]:
    """Returns the counts of steps that are still to be measured, full depth first; none of a case that failed."""
    if record.get("error") and not options.retry:
        return ()
    config = case.alone.config()
    counts = (config.model.core,) if options.full else sorted(config.trained_counts, reverse=True)
    return tuple(count for count in counts if str(count) not in record.get("counts", {}))


def environment(options: argparse.Namespace, devices: list[int]) -> dict[str, str]:
    """Returns the environment of a case. A prediction has CPU devices that leave sums of 16 bits as they are."""
    if not options.predict:
        return dict(os.environ)
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={max(devices)}",
        "--xla_disable_hlo_passes=all-reduce-promotion",
        "--xla_backend_optimization_level=0",  # no program is run
    ]
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def child(options: argparse.Namespace, *more: str) -> list[str]:
    """Returns the command of a process that joins those of the other hosts."""
    given = [f"--{name}={getattr(options, name)}" for name in DISTRIBUTED if getattr(options, name) is not None]
    shared = ["--distributed", *given] if options.distributed else given
    return [sys.executable, "-m", "benchmarks.scaling", *shared, *more]


def probed(options: argparse.Namespace) -> tuple[list[int], bool]:
    """Returns the numbers of devices to measure, and whether this process is the first of several.

    A process of its own looks, since one that has seen a GPU keeps its memory.
    """
    if options.devices and not options.distributed:
        return options.devices, True
    if options.predict:
        return [1, 2, 4, 8], True
    done = subprocess.run(child(options, "--case=devices"), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    seen = json.loads(done.stdout.splitlines()[-1])
    powers = [2**i for i in range(seen["devices"].bit_length()) if 2**i < seen["devices"]]
    return options.devices or ([] if options.distributed else powers) + [seen["devices"]], seen["process"] == 0


def run_child(case: Case, counts: tuple[int, ...], results: Results, options: argparse.Namespace, env: Any) -> None:
    """Measures a case in a process of its own, and adds each line that it prints; kills it after `--timeout`."""
    given = [f"--{name}={getattr(options, name)}" for name in ("rows", "calls", "repeats", "compilation_cache")]
    given += [f"--case={case.name}", f"--counts={','.join(map(str, counts))}"] + ["--predict"] * options.predict
    process = subprocess.Popen(child(options, *given), stdout=subprocess.PIPE, text=True, env=env)
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(options.timeout, stop)
    timer.daemon = True
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                results.add(case, {"error": None} | json.loads(line))
        process.wait()
    finally:
        timer.cancel()
        process.kill()
    if process.returncode not in (0, STOPPED) and not results.record(case).get("error"):
        why = f"stopped after {options.timeout} s" if late.is_set() else f"ended with status {process.returncode}"
        results.add(case, {"error": why})


def run_all(options: argparse.Namespace) -> None:
    """Measures every case that is missing, and prints it."""
    devices, first = probed(options)
    results = Results(options.out, {"predicted": options.predict, "rows": options.rows}, writes=first)
    cases = [(case, missing(case, results.record(case), options)) for case in cases_of(options, devices)]
    todo = [(case, counts) for case, counts in cases if counts]
    print(f"{len(todo)} cases to measure", flush=True)
    for case, counts in todo:
        run_child(case, counts, results, options, environment(options, devices))
        if first:
            print("\n".join(lines_of(case, results.content, options.peak)), flush=True)


def run_one(options: argparse.Namespace) -> int:
    """Measures the case of this process, or reports its devices."""
    use_compilation_cache(options.compilation_cache)
    with joined(distributed=options.distributed, **{name: getattr(options, name) for name in DISTRIBUTED}):
        import jax

        if options.case == "devices":
            print(json.dumps({"devices": jax.device_count(), "process": jax.process_index()}))
            return 0
        return run_case(
            Case.named(options.case), tuple(map(int, options.counts.split(","))), rows=options.rows,
            calls=options.calls, repeats=options.repeats, predict=options.predict,
        )  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the results as JSON; what it has already is not measured again")
    parser.add_argument("--report", type=Path, help="measures nothing, writes tables here and a plot beside them")
    parser.add_argument("--predict", action="store_true", help="compiles for CPU devices and counts what is sent")
    parser.add_argument("--models", default="small,medium,wide", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--meshes", default="data,fsdp,tensor", help="axes of all devices, or such as data+tensor2")
    parser.add_argument("--scaling", default="weak,strong")
    parser.add_argument(
        "--devices", type=several(whole), default=[], help="how many; default: 1, 2, 4 ... up to those that there are"
    )
    parser.add_argument("--cases", default="*", help="patterns of MODEL/MESH/DEVICES/SCALING, such as small/data/*")
    parser.add_argument("--full", action="store_true", help="full depth only, not every count of random counts")
    parser.add_argument("--rows", type=int, default=0, help="a device (weak), in all (strong); default: the model's")
    parser.add_argument("--calls", type=whole, default=5, help="updates in a row that are timed together")
    parser.add_argument("--repeats", type=whole, default=5)
    parser.add_argument("--peak", type=float, default=790, help="TFLOP/s of one device")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a case may take")
    parser.add_argument("--retry", action="store_true", help="measures the cases that failed again")
    parser.add_argument("--distributed", action="store_true", help="joins the processes of other hosts")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, for --distributed")
    parser.add_argument("--num_processes", type=int, help="for --distributed")
    parser.add_argument("--process_id", type=int, help="for --distributed")
    parser.add_argument("--compilation_cache", default="~/.cache/odelm/compiled", help="empty: none is kept")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--counts", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.models.split(",") if name not in MODELS]
    unknown += [name for name in options.scaling.split(",") if name not in SCALINGS]
    unknown += [name for name in options.meshes.split(",") if not MESH.fullmatch(name)]
    if unknown:
        known = f"models: {', '.join(MODELS)}; scaling: {', '.join(SCALINGS)}; meshes: data, fsdp, tensor, data+tensor2"
        parser.error(f"unknown: {', '.join(unknown)}; {known}")
    if options.out is None and options.case is None:
        parser.error("--out is missing: give a file for the results")
    return options


def main() -> int:
    options = parse()
    # A call that is stopped takes the process of its case with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    if options.case:
        return run_one(options)
    if options.report:
        write_report(json.loads(options.out.read_text()), options.report, options.peak)
    else:
        run_all(options)
    return 0


if __name__ == "__main__":
    run_program(main)

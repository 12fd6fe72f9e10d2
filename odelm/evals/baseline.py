"""Two models at equal latency: what each loses at the time that the other takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from odelm.compiling import side_by_side
from odelm.config import default_steps
from odelm.errors import InputError
from odelm.evals.compare import Comparison, Loaded, batches_of, length_of, text_of
from odelm.evals.report import is_finite, number, publish
from odelm.evals.sweep import Setting, evaluations_of, loss_of, make_calls, settings
from odelm.infer.latency import measure
from odelm.infer.runner import Runner
from odelm.models import CausalLM, MaskedLM

Row = dict[str, Any]


def compare_with_baseline(
    loaded: Loaded,
    baseline: Loaded,
    steps: tuple[int, ...],
    options: Comparison,
    *,
    source: Path,
    step: int | None,
    name: str,
    out: Path | None = None,
) -> Path:
    """Measures two models side by side on the text of the first, prints the tables, and returns the report's directory.

    Args:
        loaded: the model, as `odelm.load` returns it, from `source`; measured at `steps`.
        baseline: the other, called `name`; measured at its default steps.
        step, out: as in `odelm.evals.compare.compare`.

    Raises InputError if their losses cannot be compared, and if there is no text to measure them on.
    """
    _check_comparable(loaded, baseline, name)
    length = length_of(loaded[1], options, run=step is not None)
    if length > baseline[1].model.max_length:
        raise InputError(
            f"--length is {length}, past the {baseline[1].model.max_length} positions of {name}: give a smaller one"
        )
    rows, batches = batches_of(loaded, options, source=source, step=step)
    if rows is None:
        raise InputError("there is no text to compare losses on: give --text=FILE")
    pairs = []
    for (model, config, _), counts in ((loaded, steps), (baseline, default_steps(baseline[1].model))):
        runner = Runner.of(model)
        solver = options.solver if model is loaded[0] else "euler"
        pairs += [(config is baseline[1], runner, setting) for setting in settings(runner, counts, solver=solver)]
    measured = _measured(pairs, options, length, batches)
    own, other = (_at_equal_latency(measured[flag], measured[not flag]) for flag in (False, True))
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "batch": options.batch,
        "length": length,
        "text": text_of(rows, batches, loaded[1], options),
        "baseline": name,
        "rows": own,
        "baseline_rows": other,
    }
    out = source / "infer" if out is None else out
    return publish(report, out, name="baseline", draw=plot, show=print_both)


def _check_comparable(loaded: Loaded, baseline: Loaded, name: str) -> None:
    for model, _, _ in (loaded, baseline):
        if not isinstance(model, CausalLM | MaskedLM):
            raise InputError(f"a {type(model).__name__} has no language model's head to compare losses of")
    if type(loaded[0]) is not type(baseline[0]):
        raise InputError(f"{name} is another kind of model ({baseline[1].model.kind}): their losses cannot be compared")
    texts = [None if tokenizer is None else tokenizer.to_str() for _, _, tokenizer in (loaded, baseline)]
    if texts[0] != texts[1]:
        raise InputError(f"{name} has another tokenizer: losses of its tokens cannot be compared")


def _measured(
    pairs: Sequence[tuple[bool, Runner, Setting]], options: Comparison, length: int, batches: Sequence[Any]
) -> dict[bool, list[Row]]:
    """Returns the rows of the model (False) and of the baseline (True), timed in turns."""
    calls = {
        (other, setting): make_calls(runner, [setting], batch=options.batch, length=length)[setting]
        for other, runner, setting in pairs
    }
    side_by_side(lambda call: jax.block_until_ready(call()), calls.values())
    latencies = measure(calls, repeats=options.repeats)
    rows: dict[bool, list[Row]] = {False: [], True: []}
    for other, runner, setting in pairs:
        loss = loss_of(runner, setting, batches)
        assert loss is not None and setting.steps is not None
        latency = latencies[other, setting]
        rows[other].append(
            {
                "steps": setting.steps,
                "solver": setting.solver,
                "evaluations": evaluations_of(runner, setting),
                "latency_ms": {"median": latency.median, "p90": latency.p90},
                "loss": loss.loss,
                "loss_stderr": loss.stderr,
            }
        )
    return rows


def _at_equal_latency(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Returns the rows with `other_loss`, what the other model loses at the same latency.

    It is interpolated between the other's points; None at a latency that it does not reach.
    """
    points = sorted((row["latency_ms"]["median"], row["loss"]) for row in others if is_finite(row["loss"]))
    if not points:
        return [row | {"other_loss": None} for row in rows]
    times, losses = zip(*points, strict=True)
    found = []
    for row in rows:
        latency = row["latency_ms"]["median"]
        within = times[0] <= latency <= times[-1]
        found.append(row | {"other_loss": float(np.interp(latency, times, losses)) if within else None})
    return found


def print_both(report: dict[str, Any], console: Console) -> None:
    """Prints a table for each of the two models."""
    print_rows("this model", report["rows"], report, console)
    print_rows(report["baseline"], report["baseline_rows"], report, console)


def print_rows(title: str, rows: Sequence[Row], report: dict[str, Any], console: Console) -> None:
    """Prints a line for each row of one of the two models."""
    shape = f"batch {report['batch']} x {report['length']} on {report['device']}"
    table = Table(title=f"{title}, {shape}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("steps", "evals", "ms", "loss", "the other's at that time", "difference"):
        table.add_column(name, justify="right")
    for row in rows:
        other = row["other_loss"]
        difference = None if other is None else row["loss"] - other
        table.add_row(
            str(row["steps"]),
            str(row["evaluations"]),
            f"{row['latency_ms']['median']:.2f}",
            f"{row['loss']:.4f}",
            number(other, ".4f"),
            number(difference, "+.4f"),
        )
    console.print(table)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws the loss of both models against their latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for label, rows in (("this model", report["rows"]), (report["baseline"], report["baseline_rows"])):
        points = sorted((row["latency_ms"]["median"], row["loss"]) for row in rows if is_finite(row["loss"]))
        axes.plot([latency for latency, _ in points], [loss for _, loss in points], "o-", label=label)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"median latency, ms (batch {report['batch']} x {report['length']}, {report['device']})")
    axes.set_ylabel("held-out loss, nats/token")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)

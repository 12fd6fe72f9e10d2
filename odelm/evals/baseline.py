"""Compares two models at equal latency: the loss of each at the time that the other takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from odelm.config import default_steps
from odelm.errors import InputError
from odelm.evals.compare import Comparison, Loaded, batches_of, length_of, profile_of, text_of, trained_counts
from odelm.evals.report import is_finite, make_report, print_table, publish
from odelm.evals.sweep import (
    Measured,
    Row,
    Setting,
    evaluations_of,
    latencies_of,
    loss_of,
    make_calls,
    make_row,
    settings,
)
from odelm.infer.runner import Runner
from odelm.models import CausalLM, MaskedLM


def compare_with_baseline(
    loaded: Loaded,
    baseline: Loaded,
    steps: tuple[int, ...],
    options: Comparison,
    *,
    source: Path,
    step: int | None,
    name: str,
    baseline_source: Path,
    baseline_step: int | None,
    out: Path | None = None,
) -> Path:
    """Measures two models side by side on the text of the first, prints the tables, and returns the report's directory.

    Args:
        loaded: the model, as `odelm.load` returns it, from `source`; measured at `steps`.
        baseline: the other, called `name`, as `odelm.load` returns it, from `baseline_source`; measured at its default
            steps.
        step, baseline_step, out: as `step` and `out` in `odelm.evals.compare.compare`.

    Raises InputError if the models' losses cannot be compared, and if there is no text to measure them on.
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
    own, other = Runner.of(loaded[0]), Runner.of(baseline[0])
    chosen = settings(own, steps, solver=options.solver)
    profile = profile_of(loaded)
    chosen += [profile] if profile is not None and profile not in chosen else []
    pairs = [(own, chosen), (other, settings(other, default_steps(baseline[1].model)))]
    own_rows, other_rows = _measured(pairs, options, length, batches)
    for setting, row in zip(chosen, own_rows, strict=True):
        row["chosen"] = setting == profile
    text = text_of(rows, batches, loaded[1], options)
    trained = trained_counts(loaded[1], source, step)
    own_rows, other_rows = at_equal_latency(own_rows, other_rows), at_equal_latency(other_rows, own_rows)
    report = make_report(loaded[1].model, own_rows, step=step, text=text, trained=trained)
    trained = trained_counts(baseline[1], baseline_source, baseline_step)
    others = make_report(baseline[1].model, other_rows, step=baseline_step, trained=trained)
    report |= {"baseline": name, "baseline_model": others["model"], "baseline_rows": others["rows"]}
    out = source / "infer" if out is None else out
    return publish(report, out, name="baseline", draw=plot, show=print_both, width=120)


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
    pairs: Sequence[tuple[Runner, list[Setting]]], options: Comparison, length: int, batches: Sequence[Any]
) -> list[list[Row]]:
    """Returns the rows of each model, timed in turns, each against the first setting of its own model."""
    calls = {
        (number, setting): call
        for number, (runner, chosen) in enumerate(pairs)
        for setting, call in make_calls(runner, chosen, batch=options.batch, length=length).items()
    }
    latencies = latencies_of(calls, options.repeats)
    rows = []
    for number, (runner, chosen) in enumerate(pairs):
        found = [
            Measured(latencies[number, one], evaluations_of(runner, one), loss_of(runner, one, batches))
            for one in chosen
        ]
        rows.append([make_row(one, it, found[0], options.batch, length) for one, it in zip(chosen, found, strict=True)])
    return rows


def at_equal_latency(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Returns the rows with `other_loss`, the other model's loss at the same latency.

    The loss is interpolated between the other model's points; None at a latency outside their range.
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
    """Prints the table of each of the two models."""
    console.print("this model", soft_wrap=True)
    print_table(report, console)
    console.print(report["baseline"], soft_wrap=True)
    # The text was named below the first table.
    others = {"model": report["baseline_model"], "rows": report["baseline_rows"], "text": None}
    print_table(report | others, console)
    console.print("the other: what the other model loses at the same latency, between its points", soft_wrap=True)


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
    first = report["rows"][0]
    axes.set_xlabel(f"median latency, ms (batch {first['batch']} x {first['length']}, {report['device']})")
    axes.set_ylabel("held-out loss, nats/token")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)

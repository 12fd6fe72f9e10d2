"""The scores of a model at each step count: a table on the terminal, `results.json`, and `results.png`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from odelm.config import ModelConfig
from odelm.evals.report import is_finite, number
from odelm.evals.tasks.evaluate import Row
from odelm.models.precision import compute_dtype

SHARES = ("acc", "acc_norm")
"""Metrics that are shares of the items, printed in per cent; the others are perplexities."""
PANELS = {
    "accuracy, %": ("acc",),
    "accuracy by length, %": ("acc_norm",),
    "perplexity of a word": ("perplexity", "word_perplexity"),
}
"""What is drawn, and the metrics that are drawn together."""


def make_results(
    model: ModelConfig,
    rows: Sequence[Row],
    latencies: Sequence[Row],
    *,
    source: str,
    files: Mapping[str, str],
    batch: int,
    length: int,
    updates: int | None = None,
) -> dict[str, Any]:
    """Returns the results as plain values.

    Args:
        rows, latencies: as `odelm.evals.tasks.evaluate.evaluate` and `time_batches` return them.
        source: what the model was loaded from.
        files: the file of each task.
        batch, length: the rows, and the tokens of each row, that were timed.
        updates: how many updates a run was trained for; None if the model is not from a run.
    """
    return {
        "model": {"source": source, "kind": model.kind, "depth": model.depth, "trained_updates": updates},
        "device": jax.devices()[0].device_kind,
        "dtype": compute_dtype(model).name,
        "jax": jax.__version__,
        "tasks": dict(files),
        "batch": batch,
        "length": length,
        "latencies": list(latencies),
        "rows": list(rows),
    }


def print_results(results: dict[str, Any], console: Console) -> None:
    """Prints a line for each task and metric, with a column for each step count."""
    model, by_steps = results["model"], _by_steps(results["rows"])
    table = Table(
        title=f"{model['kind']}, depth {model['depth']}, {results['dtype']} on {results['device']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    counts = [latency["steps"] for latency in results["latencies"]]
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    for name in ("n", "random", "majority", *map(_steps, counts)):
        table.add_column(name, justify="right")
    for (task, metric), rows in by_steps.items():
        first = rows[counts[0]]
        shown = [_shown(rows[count]) for count in counts]
        baselines = [_baseline(metric, first[name]) for name in ("random", "majority")]
        table.add_row(task, metric, f"{first['n']:,}", *baselines, *shown)
    times = [f"{latency['latency_ms']['median']:.2f}" for latency in results["latencies"]]
    table.add_row("ms a batch", f"{results['batch']} x {results['length']}", "", "", "", *times, end_section=True)
    console.print(table)
    console.print("accuracies in per cent; ± is one standard error over items; see docs/tasks.md", soft_wrap=True)


def plot_results(results: dict[str, Any], path: Path) -> None:
    """Draws each metric against the time of a batch, with a line for each task, and for a group only its mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    times = {latency["steps"]: latency["latency_ms"]["median"] for latency in results["latencies"]}
    drawn = {key: rows for key, rows in _by_steps(results["rows"]).items() if "/" not in key[0]}
    panels = {label: metrics for label, metrics in PANELS.items() if any(metric in metrics for _, metric in drawn)}
    colours = {task: f"C{i % 10}" for i, task in enumerate(dict.fromkeys(task for task, _ in drawn))}
    size = (max(4.2 * len(panels), 6.4), 4.0)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for panel, (label, metrics) in zip(axes[0], panels.items(), strict=True):
        for (task, metric), rows in drawn.items():
            if metric in metrics:
                _draw_line(panel, task, [rows[count] for count in times], times, colours[task])
        panel.set_xlim(0, 1.15 * max(times.values()))
        panel.set_yscale("linear" if metrics[0] in SHARES else "log")
        panel.set_xlabel(
            f"median ms a batch ({results['batch']} x {results['length']}, {results['device']})", fontsize=8
        )
        panel.set_ylabel(label)
        panel.legend(fontsize=8)
        named = panel.secondary_xaxis("top")
        named.set_xticks(list(times.values()), [_steps(count) for count in times], rotation=60, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_line(axes: Any, task: str, rows: Sequence[Row], times: Mapping[int, float], colour: str) -> None:
    """Draws the values of a task with one standard error, and for an accuracy the score of guessing as a dotted
    line."""
    finite = [row for row in rows if is_finite(row["value"])]
    scale = 100 if rows[0]["metric"] in SHARES else 1
    errors = [scale * row["stderr"] if is_finite(row["stderr"]) else 0.0 for row in finite]
    places, values = [times[row["steps"]] for row in finite], [scale * row["value"] for row in finite]
    axes.errorbar(places, values, errors, fmt="o-", capsize=2, color=colour, label=task)
    if scale != 1 and is_finite(rows[0]["random"]):
        axes.axhline(scale * rows[0]["random"], ls=":", lw=0.8, color=colour)


def _by_steps(rows: Sequence[Row]) -> dict[tuple[str, str], dict[int, Row]]:
    """Returns the rows by task and metric, and then by the number of steps."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["metric"]), {})[row["steps"]] = row
    return found


def _shown(row: Row) -> str:
    """Returns a value with its standard error in the same form, as shown in the table."""
    form = _form(row["metric"], row["value"])
    scale = 100 if row["metric"] in SHARES else 1
    error = f" ± {scale * row['stderr']:{form}}" if is_finite(row["stderr"]) else ""
    return f"{scale * row['value']:{form}}{error}"


def _baseline(metric: str, value: float | None) -> str:
    return number(None if value is None else (100 if metric in SHARES else 1) * value, _form(metric, value))


def _form(metric: str, value: float | None) -> str:
    if metric in SHARES:
        return ".1f"
    return ",.2f" if value is None or value < 1e5 else ".1e"


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"

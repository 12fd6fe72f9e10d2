"""Runs that differ in their seed: mean and spread of their last evaluations, as a table, a file and a figure."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from odelm.config import Config
from odelm.errors import InputError
from odelm.evals.report import is_finite, number, publish
from odelm.run_directory import read_config

RESULTS, METRICS, LOSS = "results", "metrics.jsonl", "loss"
Row = dict[str, Any]


def seed_folder(workdir: Path, seed: int) -> Path:
    """Returns the run directory of a seed."""
    return workdir / f"seed-{seed}"


def seeds_in(workdir: Path) -> list[int]:
    """Returns the seeds that have a run directory, ascending."""
    names = (path.parent.name.removeprefix("seed-") for path in workdir.glob("seed-*/config.json"))
    return sorted(int(name) for name in names if name.isdecimal())


def report_seeds(workdir: Path, seeds: Sequence[int]) -> Path:
    """Writes `results.json` and `results.png` of the runs of some seeds, prints their table, and returns the directory.

    Raises InputError for a run that has recorded no evaluation, and for runs that were evaluated after another number
    of updates, or at other step counts.
    """
    folders = [seed_folder(workdir, seed) for seed in seeds]
    config = read_config(folders[0])
    records = [last_evaluation(folder) for folder in folders]
    rows = make_rows(config, seeds, records)
    results = {
        "task": _task(config),
        "updates": records[0]["step"],
        "sampling": config.step_sampling.kind,
        "rows": rows,
    }
    width = 50 + 18 * len({row["steps"] for row in rows})
    return publish(results, workdir, name=RESULTS, draw=plot_seeds, show=print_seeds, width=width, quality="mean")


def last_evaluation(folder: Path) -> dict[str, Any]:
    """Returns the last record of an evaluation in a run directory."""
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [record for record in map(json.loads, lines) if "eval_loss" in record]
    if not found:
        raise InputError(f"{folder} has recorded no evaluation: train it to its end")
    return found[-1]


def make_rows(config: Config, seeds: Sequence[int], records: Sequence[dict[str, Any]]) -> list[Row]:
    """Returns a row for each metric and step count: `task`, `metric`, `steps`, `evaluations`, `mean`, `std`, `seeds`,
    `values`, `n` and `majority`.

    `std` is the standard deviation of a sample (divided by the number of seeds less 1), nan for a single seed; `n` is
    how many examples, or tokens, were evaluated; `majority` is None where it means nothing. The loss is a metric too.
    """
    by_seed = [_values(record) for record in records]
    for seed, record, values in zip(seeds, records, by_seed, strict=True):
        if record["step"] != records[0]["step"]:
            most = max(found["step"] for found in records)
            raise InputError(
                f"seed {seed} was evaluated after {record['step']} updates, seed {seeds[0]} after "
                f"{records[0]['step']}: run the command with all seeds, and --config.train.updates={most}"
            )
        if values.keys() != by_seed[0].keys():
            raise InputError(
                f"seed {seed} evaluated other step counts than seed {seeds[0]}: run the command with all seeds, and "
                "more --config.train.updates, to evaluate them alike"
            )
    rows, majority = [], records[0].get("eval_majority", {})
    for metric, steps in by_seed[0]:
        values = [found[metric, steps] for found in by_seed]
        known = [math.nan if value is None else value for value in values]
        rows.append(
            {
                "task": _task(config),
                "metric": metric,
                "steps": steps,
                "evaluations": config.model.ends + steps,
                "mean": float(np.mean(known)),
                "std": float(np.std(known, ddof=1)) if len(known) > 1 else math.nan,
                "seeds": list(seeds),
                "values": known,
                "n": records[0]["eval_tokens"],
                "majority": majority.get(metric),
            }
        )
    return rows


def print_seeds(results: dict[str, Any], console: Console) -> None:
    """Prints a line for each metric, with a column for each step count."""
    rows = results["rows"]
    counts = list(dict.fromkeys(row["steps"] for row in rows))
    title = f"{results['task']}, {results['updates']} updates, depth steps drawn: {results['sampling']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("metric")
    for name in ("n", "majority", *(f"{count} steps" for count in counts)):
        table.add_column(name, justify="right")
    for metric in dict.fromkeys(row["metric"] for row in rows):
        of_metric = {row["steps"]: row for row in rows if row["metric"] == metric}
        first = of_metric[counts[0]]
        majority = None if first["majority"] is None else _scale(metric) * first["majority"]
        shown = (spread_text(of_metric[count]) for count in counts)
        table.add_row(metric, f"{first['n']:,}", number(majority, ".1f"), *shown)
    console.print(table)
    seeds = rows[0]["seeds"]
    console.print(
        f"metrics times 100, losses as they are; mean ± standard deviation over {len(seeds)} seeds "
        f"({', '.join(map(str, seeds))})",
        soft_wrap=True,
    )


def plot_seeds(results: dict[str, Any], path: Path) -> None:
    """Draws each metric over the number of steps, with one standard deviation, and the score of the majority as a
    dotted line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = list(dict.fromkeys(row["metric"] for row in results["rows"]))
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.6), layout="constrained", squeeze=False)
    for panel, metric in zip(axes[0], metrics, strict=True):
        rows = [row for row in results["rows"] if row["metric"] == metric and is_finite(row["mean"])]
        errors = [row["std"] if is_finite(row["std"]) else 0.0 for row in rows]
        panel.errorbar([row["steps"] for row in rows], [row["mean"] for row in rows], errors, fmt="o-", capsize=2)
        if rows and rows[0]["majority"] is not None:
            panel.axhline(rows[0]["majority"], ls=":", lw=0.8, color="grey", label="majority")
            panel.legend(fontsize=8)
        panel.set_xlabel("depth steps")
        panel.set_ylabel(f"{results['task']}: {metric}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _values(record: dict[str, Any]) -> dict[tuple[str, int], float | None]:
    """Returns the values that an evaluation recorded, by metric and step count, the loss last."""
    scores = record.get("eval_metrics", {})
    names = list(next(iter(scores.values()), {}))
    found = {(name, int(steps)): of_steps[name] for name in names for steps, of_steps in scores.items()}
    return found | {(LOSS, int(steps)): loss for steps, loss in record["eval_loss"].items()}


def _task(config: Config) -> str:
    return config.data.task or config.data.corpus


def _scale(metric: str) -> float:
    return 1.0 if metric == LOSS else 100.0


def spread_text(row: Row) -> str:
    """Returns the mean of a row and, of several seeds, its standard deviation: the loss as it is, scores times 100."""
    form = ".4f" if row["metric"] == LOSS else ".1f"
    scale = _scale(row["metric"])
    if not is_finite(row["mean"]):
        return "-"
    return f"{scale * row['mean']:{form}}" + (f" ± {scale * row['std']:{form}}" if is_finite(row["std"]) else "")

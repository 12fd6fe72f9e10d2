"""Compares ways to generate on a run's own text: prompts, table, `generation.json` and `generation.png`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from odelm.config import ModelConfig
from odelm.evals.generation import Row
from odelm.evals.report import is_finite, number
from odelm.models.precision import compute_dtype


def make_generation_report(
    model: ModelConfig, rows: Sequence[Row], *, text: dict[str, Any] | None, quantization: str | None = None
) -> dict[str, Any]:
    """Returns the report as plain values: the device, the dtype, how the model is quantised, the text and the rows."""
    return {
        "device": jax.devices()[0].device_kind,
        "dtype": compute_dtype(model).name,
        "quantize": quantization,
        "jax": jax.__version__,
        "depth": model.depth,
        "text": text,
        "rows": list(rows),
    }


def print_generation(report: dict[str, Any], console: Console) -> None:
    """Prints a line for each way."""
    rows = report["rows"]
    first = rows[0]
    shape = f"batch {first['batch']}, {first['new_tokens']} tokens after {first['prompt']}"
    numbers = report["dtype"] if report["quantize"] is None else f"{report['dtype']} and {report['quantize']}"
    table = Table(
        title=f"depth {report['depth']}, {shape}, {numbers} on {report['device']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    drafts = ("per pass", "accepted", "identical") if any(row["draft_steps"] for row in rows) else ()
    exits = ("evals",) if any(row["early_exit"] for row in rows) else ()
    times = ("prompt ms", "ms/token", "tokens/s", "speed-up")
    columns = ("steps", *exits, *times, "MB", "compile s", "loss", "rise", *drafts)
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["label"],
            *(number(row["evaluations"] or row["text_evaluations"], ".3g") for _ in exits),
            f"{row['prefill_ms']:.2f}",
            number(row["token_ms"], ".3f"),
            number(row["tokens_per_s"], ",.0f"),
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            f"{row['memory_bytes'] / 1e6:.1f}",
            f"{row['compile_s']:.1f}",
            number(row["loss"], ".4f"),
            number(row["loss_increase"], "+.2%"),
            *(number(row[name], form) for name, form in _drafts(drafts)),
        )
    console.print(table)
    for said, labels in _decoders(rows).items():
        console.print(
            f"decoded by {said}" + (f": {'; '.join(labels)}" if len(labels) < len(rows) else ""), soft_wrap=True
        )
    if drafts:
        console.print("draft 3 x 4: up to 4 tokens drafted in 3 steps, verified at full depth", soft_wrap=True)
    text = report["text"]
    if text is not None:
        console.print(
            f"losses of the second halves of sequences after their first, {first['loss_tokens']:,} tokens of "
            f"{text['documents']:,} documents of {text['source']}",
            soft_wrap=True,
        )


def plot_generation(report: dict[str, Any], path: Path) -> None:
    """Draws loss against the time of a token, where both are known, each point labelled by its steps."""
    rows = [row for row in report["rows"] if is_finite(row["loss"]) and row["token_ms"] is not None]
    if not rows:
        path.unlink(missing_ok=True)  # an earlier report's figure would be taken for this one's
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for kind, of_kind in _kinds(rows).items():
        axes.plot([row["token_ms"] for row in of_kind], [row["loss"] for row in of_kind], "o", label=kind)
    for i, row in enumerate(rows):
        axes.annotate(
            row["label"],
            (row["token_ms"], row["loss"]),
            xytext=(4, 6 if i % 2 else -12),
            textcoords="offset points",
            fontsize=8,
        )
    losses = [row["loss"] for row in rows]
    spread = max(max(losses) - min(losses), 0.06 * max(losses))
    axes.set_ylim(min(losses) - 0.8 * spread, max(losses) + 0.8 * spread)
    axes.set_xlim(0, 1.25 * max(row["token_ms"] for row in rows))
    axes.set_xlabel(f"ms a token (batch {rows[0]['batch']}, {report['device']})")
    axes.set_ylabel("held-out loss, nats/token")
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _decoders(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the labels of the rows by the program that decoded them."""
    found: dict[str, list[str]] = {}
    for row in rows:
        said = f"{row['kernel']} ({row['kernel_reason']})" if row["kernel_reason"] else row["kernel"]
        found.setdefault(said, []).append(row["label"])
    return found


def _kinds(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns the rows by their kind of way."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(_kind(row), []).append(row)
    return kinds


def _kind(row: Row) -> str:
    if row["draft_steps"]:
        return "drafts"
    if not row["own_kv_span"]:
        return "shared keys and values"
    if row["early_exit"]:
        return f"early exits, by the {row['exit_measure']}"
    return "two grids" if row["prefill_steps"] != row["steps"] else "one grid"


def _drafts(columns: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the name in a row, and the format, of each column about drafts."""
    named = {
        "per pass": ("tokens_per_round", ".2f"),
        "accepted": ("accepted", ".0%"),
        "identical": ("identical", ".0%"),
    }
    return [named[column] for column in columns]

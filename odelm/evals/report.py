"""The report of a sweep: a table on the terminal, `report.json`, and `report.png`."""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.evals.sweep import Row
from odelm.files import write_text
from odelm.models.precision import compute_dtype

Draw = Callable[[dict[str, Any], Path], None]
Show = Callable[[dict[str, Any], Console], None]


def make_report(
    model: ModelConfig,
    rows: Sequence[Row],
    *,
    step: int | None = None,
    text: dict[str, Any] | None = None,
    trained: Sequence[int] = (),
) -> dict[str, Any]:
    """Returns the report as plain values: the device, the dtype, the model, the text, and the rows of a sweep.

    `trained` are the counts of Euler steps that the model was trained with; rows of other counts are marked.
    """
    shape = {
        name: getattr(model, name)
        for name in ("kind", "width", "heads", "depth", "groups", "kv_span", "vocab_size", "embed_size")
    }
    return {
        "device": jax.devices()[0].device_kind,
        "dtype": compute_dtype(model).name,
        "jax": jax.__version__,
        "model": {**shape, "norm_placement": model.norm_placement, "trained_updates": step},
        "text": text,
        "rows": [row | {"trained": _is_trained(row, trained)} for row in rows],
    }


def _is_trained(row: Row, trained: Sequence[int]) -> bool:
    return row["solver"] == "euler" and row["steps"] in trained and row["grid"] is row["early_exit"] is None


def print_table(report: dict[str, Any], console: Console) -> None:
    """Prints a line for each row."""
    first = report["rows"][0]
    model, shape = report["model"], f"batch {first['batch']} x {first['length']}"
    table = Table(
        title=f"{model['kind']}, depth {model['depth']}, {shape}, {report['dtype']} on {report['device']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    adapted = ("before",) if "loss_before" in first else ()
    bounds = ("at most",) if "loss_increase_bound" in first else ()
    kinds = ("8 bits", "MB") if "quantize" in first else ()
    others = ("the other", "difference") if "other_loss" in first else ()
    metrics = tuple(first.get("metrics", ()))
    columns = ("steps", "solver", "evals", "ms", "p90", "tokens/s", "speed-up", "loss", "rise", *bounds, *adapted)
    columns += (*others, *metrics)
    for name in (*kinds, *columns):
        table.add_column(name, justify="right")
    grids = ("times",) if any(row["grid"] for row in report["rows"]) else ()
    for name in grids:
        table.add_column(name)
    for row in report["rows"]:
        table.add_row(
            *((row["quantize"] or "none", f"{row['bytes'] / 1e6:.2f}") if kinds else ()),
            ("> " if row["chosen"] else "") + _label(row) + ("" if row["trained"] else " *"),
            row["solver"] + (", diffrax" if row["integrator"] == "diffrax" and row["steps"] is not None else ""),
            f"{row['evaluations']:.4g}" if is_finite(row["evaluations"]) else "-",
            f"{row['latency_ms']['median']:.2f}",
            f"{row['latency_ms']['p90']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['speedup']:.2f}x",
            number(row["loss"], ".4f"),
            number(row["loss_increase"], "+.2%"),
            *(number(row["loss_increase_bound"], "+.2%") for _ in bounds),
            *(number(row["loss_before"], ".4f") for _ in adapted),
            *(_against_other(row) if others else ()),
            *(number(row["metrics"][name], ".4f") for name in metrics),
            *(_times(row) for _ in grids),
        )
    console.print(table)
    text = report["text"]
    if text is not None and first["loss_stderr"] is not None:
        console.print(
            f"losses on {_measured_on(text)}; standard error {first['loss_stderr']:.4f} at full depth", soft_wrap=True
        )
    if any(row["chosen"] for row in report["rows"]):
        console.print("> the way to cross the depth that profile.json has", soft_wrap=True)
    if not all(row["trained"] for row in report["rows"]):
        console.print(
            "* a count of steps, a solver or a span of keys and values that the model was not trained with: "
            "see docs/method.md",
            soft_wrap=True,
        )


def _measured_on(text: dict[str, Any]) -> str:
    if "task" in text:
        majority = ", ".join(f"{name} {value:.4f}" for name, value in text["majority"].items())
        return f"{text['documents']:,} examples of {text['task']}, whose most frequent class scores {majority}"
    return f"{text['tokens']:,} tokens of {text['documents']:,} documents of {text['source']}"


def publish(
    report: dict[str, Any],
    directory: Path,
    *,
    name: str = "report",
    draw: Draw | None = None,
    show: Show | None = None,
    width: int = 100,
    quality: str = "loss",
) -> Path:
    """Writes a report and prints its table, even if the report cannot be written; returns the directory.

    `draw` and `show` are for another kind of report than that of a sweep, `width` is the columns of a table that is not
    printed to a terminal, and `quality` the value of rows that is drawn. Raises InputError if the report cannot be
    written.
    """
    # Output that is not a terminal has no width of its own; a terminal's may cut the numbers short.
    console = Console(width=None if sys.stdout.isatty() else width)
    try:
        write_report(report, directory, name=name, draw=draw or plot, quality=quality)
    except OSError as error:
        raise InputError(f"the report cannot be written to {directory} ({error}); give --out") from error
    finally:
        (show or print_table)(report, console)
    return directory


def check_out(directory: Path) -> Path:
    """Returns the directory of a report; InputError if it cannot be made or written to, before anything is measured."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written" if existing.is_dir() else "is a file"
        raise InputError(f"the report cannot be written to {directory}, because {existing} {what}; give --out")
    return directory


def write_report(
    report: dict[str, Any],
    directory: Path,
    *,
    name: str = "report",
    draw: Draw | None = None,
    quality: str = "loss",
) -> None:
    """Writes `report.json`, with null for values that are not finite, and `report.png` if there are losses, or other
    values of `quality`, to draw. `name` and `draw` set another file name and another function that draws."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / f"{name}.json", json.dumps(_plain(report), indent=2, allow_nan=False) + "\n")
    if any(is_finite(row[quality]) for row in report["rows"]):
        (draw or plot)(report, directory / f"{name}.png")
    else:
        # An earlier report's figure would be taken for this one's.
        (directory / f"{name}.png").unlink(missing_ok=True)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws held-out loss against latency where it is finite, each point labelled by its steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in report["rows"] if is_finite(row["loss"])]
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for line in dict.fromkeys(_line(row) for row in rows):
        points = sorted((row["latency_ms"]["median"], row["loss"]) for row in rows if _line(row) == line)
        axes.plot(*zip(*points, strict=True), "o-", label=line)
    past = [(row["latency_ms"]["median"], row["loss_before"]) for row in rows if is_finite(row.get("loss_before"))]
    if past:
        axes.plot(*zip(*past, strict=True), "s--", color="grey", label="before adaptation")
    for row in rows:
        if row["chosen"]:
            axes.plot(row["latency_ms"]["median"], row["loss"], "*", color="black", markersize=12, label="chosen")
    full, dial = report["rows"][0]["loss"], report.get("dial")
    if is_finite(full) and dial is not None:
        limit = dial["max_loss_increase"]
        axes.axhspan(full, full * (1 + limit), alpha=0.15, label=f"full depth + {percent(limit)}")
    elif is_finite(full):
        axes.axhspan(full * 0.99, full * 1.01, alpha=0.15, label="full depth ± 1 %")
    losses = [row["loss"] for row in rows] + [loss for _, loss in past]
    spread = max(max(losses) - min(losses), 0.06 * max(losses))
    axes.set_ylim(min(losses) - 0.8 * spread, max(losses) + 0.8 * spread)
    axes.set_xlim(0, 1.15 * max(row["latency_ms"]["median"] for row in rows))
    axes.set_xlabel(f"median latency, ms (batch {rows[0]['batch']} x {rows[0]['length']}, {report['device']})")
    axes.set_ylabel("held-out loss, nats/token")
    axes.legend(loc="lower left", fontsize=8)
    _label_points(axes, rows)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _line(row: Row) -> str:
    """Returns the name of the line that a row is a point of."""
    if "quantize" in row:
        kind = row["quantize"] or "not quantised"
        return kind if row["solver"] == "euler" else f"{kind}, {row['solver']}"
    if row["steps"] is None:
        return f"{row['solver']}, by tolerance"
    if row["early_exit"] is not None:
        return f"early exits from {row['steps']}, by the {row['exit_measure']}"
    unequal = ", unequal steps" if row["grid"] else ""
    return row["solver"] + (", diffrax" if row["integrator"] == "diffrax" else "") + unequal


def _label_points(axes: Any, rows: Sequence[Row]) -> None:
    """Writes steps and speed-up at each point, as near to it as possible without overlaps and within the axes.

    Quantised models take the same steps as the model itself, so then only the model's points are labelled.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    renderer = axes.figure.canvas.get_renderer()
    points = axes.transData.transform([(row["latency_ms"]["median"], row["loss"]) for row in rows])
    placed = [axes.get_legend().get_window_extent(renderer), *(Bbox([point - 5, point + 5]) for point in points)]
    for row in (row for row in rows if not row.get("quantize")):
        text = axes.annotate(
            f"{_label(row)} steps\n{row['speedup']:.1f}x",
            (row["latency_ms"]["median"], row["loss"]),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            fontsize=8,
            arrowprops=dict(arrowstyle="-", lw=0.4, color="grey"),
        )
        text.set_in_layout(False)
        tries = [(x, y) for y in (8, -28, 32, -52, 56, -76, 80, -100, 104) for x in (0, -44, 44, -88, 88, -132)]
        for offset in tries:
            text.set_position(offset)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line to the point
            if axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) and not any(map(box.overlaps, placed)):
                break
        placed.append(Text.get_window_extent(text, renderer))


def is_finite(value: float | None) -> bool:
    """Returns whether there is a value, and it is finite."""
    return value is not None and math.isfinite(value)


def _plain(value: Any) -> Any:
    """Returns plain values, with None for non-finite numbers."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None, form: str) -> str:
    """Returns a number as shown in a table: a dash if there is none."""
    return "-" if value is None else format(value, form)


def percent(share: float) -> str:
    """Returns a share in per cent, in as many digits as it has."""
    return f"{100 * share:.6g} %"


def _against_other(row: Row) -> tuple[str, str]:
    """Returns another model's loss at the latency of a row, and how much higher the row's loss is."""
    other = row["other_loss"]
    return number(other, ".4f"), number(None if other is None else row["loss"] - other, "+.4f")


def _times(row: Row) -> str:
    """Returns the times of a grid of unequal steps."""
    return " ".join(f"{time:g}" for time in row["grid"] or ())


def _label(row: Row) -> str:
    if row["early_exit"] is not None:
        return f"{row['steps']}, exit {row['early_exit']:g}"
    return str(row["steps"]) if row["steps"] is not None else f"tol {row['tolerance']:g}"

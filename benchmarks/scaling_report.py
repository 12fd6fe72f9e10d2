"""The results of `benchmarks.scaling` as lines, as tables in Markdown, and as a plot."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scaling_case import Case
from odelm.files import write_text
from odelm.train.flops import training_flops

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """An update of a case: of one count of steps, or the mean over the counts that are drawn."""

    case: Case
    steps: str
    """`12 steps`, or `random`."""
    full: bool
    """Whether it is of full depth."""
    seconds: float | None
    """Of an update; None of a prediction."""
    tokens_per_s: float | None
    share: float | None
    """Of the peak of a device."""
    sent: dict[str, float] | None
    """Bytes that come out of each kind of collective on a device, None where the program cannot be read."""
    against_one: float | None
    """Tokens/s against one device: with weak scaling per device, else in all. None where either is missing."""


def rows_of(case: Case, content: Record, peak: float) -> list[Row]:
    """Returns the rows of a case, full depth first, at a peak of so many TFLOP/s a device."""
    record = content["cases"].get(case.name, {})
    one = content["cases"].get(case.alone.name, {})
    config = case.alone.config()
    counts, single = record.get("counts", {}), one.get("counts", {})
    chosen = {f"{count} steps": [count] for count in counts}
    drawn = [str(count) for count in config.trained_counts]
    if len(drawn) > 1 and set(drawn) <= set(counts):
        chosen["random"] = drawn
    rows = []
    for steps, of in chosen.items():
        measured = "seconds" in counts[of[0]]
        seconds = statistics.mean(counts[n]["seconds"] for n in of) if measured else None
        rate = share = against = None
        if seconds is not None:
            rate = record["rows"] * record["length"] / seconds
            flops = [training_flops(config.model, steps=int(n), length=record["length"]) for n in of]
            share = statistics.mean(flops) * rate / case.devices / peak / 1e12
            if case.devices > 1 and all("seconds" in single.get(n, {}) for n in of):
                alone = one["rows"] * one["length"] / statistics.mean(single[n]["seconds"] for n in of)
                against = rate / alone / (case.devices if case.scaling == "weak" else 1)
        full = of == [str(config.model.core)]
        rows.append(Row(case, steps, full, seconds, rate, share, _mean_sent([counts[n] for n in of]), against))
    return rows


def _mean_sent(counts: list[Record]) -> dict[str, float] | None:
    sent = [count["collectives"] for count in counts]
    if None in sent:
        return None
    kinds = dict.fromkeys(kind for found in sent for kind in found)
    return {kind: statistics.mean(found.get(kind, 0) for found in sent) for kind in kinds}


def lines_of(case: Case, content: Record, peak: float) -> list[str]:
    """Returns what is printed of a case when it is measured."""
    record = content["cases"].get(case.name, {})
    head = f"{case.name}: "
    if "rows" in record:
        head += f"{record['rows']} x {record['length']}, {record['parameters'] / 1e6:.1f} M parameters, "
        head += f"{record['device']}, jax {record['jax']}"
    lines = [head]
    for row in rows_of(case, content, peak):
        lines.append("  " + "  ".join(cell for cell in (f"{row.steps:9}", *_cells(row)) if cell))
    if record.get("error"):
        lines.append(f"  failed: {record['error']}")
    return lines


def _cells(row: Row) -> list[str]:
    """Returns the update, tokens/s, share of peak, comparison with one device, and what is sent."""
    if row.seconds is None or row.tokens_per_s is None or row.share is None:
        return ["", "", "", "", _shown(row.sent)]
    against = "" if row.against_one is None else f"{row.against_one:.2f}x"
    if row.against_one is not None and row.case.scaling == "weak":
        against = f"{row.against_one:.1%}"
    rate = f"{row.tokens_per_s / 1e3:,.1f} k tokens/s"
    return [f"{1e3 * row.seconds:.2f} ms", rate, f"{row.share:.1%}", against, _shown(row.sent)]


def _shown(sent: dict[str, float] | None) -> str:
    if sent is None:
        return "unknown"
    return ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in sent.items()) or "nothing"


def tables(content: Record, peak: float) -> list[str]:
    """Returns the tables as lines of Markdown: weak and strong scaling, and what failed."""
    cases = [Case.named(name) for name in content["cases"]]
    if content["settings"]["predicted"]:
        return predicted_table([row for case in cases for row in rows_of(case, content, peak)], content)
    lines: list[str] = []
    meaning = {"weak": "tokens/s per device against one", "strong": "tokens/s against one device"}
    for scaling, against in meaning.items():
        chosen = [case for case in cases if case.scaling == scaling]
        if not chosen:
            continue
        chosen = list(dict.fromkeys(case.alone for case in chosen)) + chosen
        models = list(dict.fromkeys(case.model for case in chosen))
        lines += [f"## {scaling.capitalize()} scaling", ""]
        lines += [f"| model | mesh | devices | rows | | update | tokens/s | of the peak | {against} | sent |"]
        lines += ["|---" * 10 + "|"]
        for case in sorted(chosen, key=lambda case: models.index(case.model)):
            rows = content["cases"].get(case.name, {}).get("rows", "")
            for row in rows_of(case, content, peak):
                cells = [case.model, case.mesh, str(case.devices), str(rows), row.steps, *_cells(row)]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines + _failures(content)


def predicted_table(rows: list[Row], content: Record) -> list[str]:
    """Returns the lines of what would be sent, in MB, a column for each number of devices."""
    rows = [row for row in rows if row.case.devices > 1]
    devices = sorted({row.case.devices for row in rows})
    lines = ["| model | parameters | mesh | | collective, MB | " + " | ".join(f"{n} devices" for n in devices) + " |"]
    lines += ["|---" * (5 + len(devices)) + "|"]
    grouped: dict[tuple[str, ...], dict[int, dict[str, float] | None]] = {}
    for row in rows:
        parameters = f"{content['cases'][row.case.name]['parameters'] / 1e6:.1f} M"
        scaling = "" if row.case.scaling == "weak" else ", strong"
        key = (row.case.model, parameters, row.case.mesh, row.steps + scaling)
        grouped.setdefault(key, {})[row.case.devices] = row.sent
    for key, sent in grouped.items():
        for kind in sorted({kind for found in sent.values() for kind in found or {}}):
            sizes = [(sent.get(n) or {}).get(kind) for n in devices]
            cells = [*key, kind, *("" if size is None else f"{size / 1e6:,.1f}" for size in sizes)]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *_failures(content)]


def _failures(content: Record) -> list[str]:
    return [f"- {name} failed: {record['error']}" for name, record in content["cases"].items() if record.get("error")]


def write_report(content: Record, path: Path, peak: float) -> None:
    """Writes the tables, and beside them the plot if anything was timed on several devices."""
    write_text(path, "\n".join(tables(content, peak)).rstrip() + "\n")
    rows = [row for name in content["cases"] for row in rows_of(Case.named(name), content, peak)]
    if any(row.against_one is not None for row in rows):
        plot(rows, path.with_suffix(".png"))
        print(f"written to {path} and {path.with_suffix('.png')}")
    else:
        print(f"written to {path}")


def plot(rows: Iterable[Row], path: Path) -> None:
    """Draws weak and strong scaling at full depth over the number of devices, a line for each model and mesh."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = dict(zip(("weak", "strong"), figure.subplots(1, 2), strict=True))
    shown = [row for row in rows if row.full and row.against_one is not None]
    counts = [1, *sorted({row.case.devices for row in shown})]
    for scaling, axes in panels.items():
        axes.plot(counts, [1.0] * len(counts) if scaling == "weak" else counts, ":", color="grey", label="ideal")
        chosen = [row for row in shown if row.case.scaling == scaling]
        for line in dict.fromkeys((row.case.model, row.case.mesh) for row in chosen):
            points = [(row.case.devices, row.against_one) for row in chosen if (row.case.model, row.case.mesh) == line]
            axes.plot(*zip((1, 1.0), *sorted(points), strict=True), "o-", label=" ".join(line), markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("devices")
        axes.legend(fontsize="small")
    panels["weak"].set_ylabel("weak scaling: tokens/s per device against one")
    panels["weak"].set_ylim(0, 1.1)
    panels["strong"].set_yscale("log", base=2)
    panels["strong"].set_yticks(counts, [str(count) for count in counts])
    panels["strong"].set_ylabel("strong scaling: tokens/s against one device")
    figure.savefig(path, dpi=150)

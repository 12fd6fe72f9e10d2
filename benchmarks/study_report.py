"""The tables of docs/study.md, from the files that `benchmarks.study` and `benchmarks.study_times` wrote.

    python -m benchmarks.study_report docs/study [--against=unshared] [--plot=FILE.png [--rows=A,B]]

A row is named by its files; a file `glue_ROW.json` is one that `benchmarks.glue` wrote for the encoder of that row.
First what a row is and takes: parameters, updates, tokens, and seconds of training, those of its updates without
compiling and evaluating. Then held-out losses at each number of evaluations, the mean over the seeds and half their
range, with what a pass takes against that of `--against` at full depth. Then, for decoders and for encoders, the losses
at equal time and at equal tokens: each row's last evaluation that comes no later than the end of the shortest row of
those compared, read from the same curves, in which the learning rate is still falling for the rows that take longer.
Then the scores of the tasks and of GLUE, losses with matrices of 8 bits, how smoothly the rows trained, and what the
fields look like. The plot has the curves of `--rows`, or of all that were timed, against the seconds of training.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import run_program
from benchmarks.options import several
from benchmarks.study_rows import TRAINED_AS
from benchmarks.study_times import TIMES, training_seconds
from odelm.config import from_json
from odelm.evals.seeds import spread_text

Record = dict[str, Any]
Runs = dict[str, list[Record]]
SHARES = ("acc", "acc_norm")
"""Metrics that are shares; the others are perplexities."""


def read(folder: Path) -> Runs:
    """Returns the records of each row."""
    found: Runs = defaultdict(list)
    for file in sorted(folder.glob("*_[0-9]*.json")):
        if "_rates_" in file.stem:  # the trials of a row such as groups_2
            continue
        found[file.stem.rpartition("_")[0]].append(json.loads(file.read_text()))
    return dict(found)


def read_times(folder: Path) -> Record:
    """Returns the seconds of updates and passes of each row, nothing where none were measured.

    A row that is another trained for longer or shorter has its seconds, if none of its own were measured.
    """
    file = folder / TIMES
    found = json.loads(file.read_text())["rows"] if file.exists() else {}
    return {row: found[like] for row, like in TRAINED_AS.items() if like in found} | found


def with_seconds(runs: Runs, times: Record) -> Runs:
    """Returns the records of the rows that were timed, with the seconds of training at each point of their curves.

    They are those of `times`, else those that a row's own file has from a training alone on the card.
    """
    found: Runs = {}
    for row, records in runs.items():
        if row in times:
            seconds = {int(count): value for count, value in times[row]["update_s"].items()}
            found[row] = [_with_seconds(record, seconds) for record in records]
        elif "seconds" in records[0]["curve"][-1]:
            found[row] = [record for record in records if "seconds" in record["curve"][-1]]
    return found


def _with_seconds(record: Record, seconds: dict[int, float]) -> Record:
    config = from_json(json.dumps(record["config"]))
    curve = [point | {"seconds": training_seconds(config, seconds, point["update"])} for point in record["curve"]]
    return record | {"curve": curve}


def sizes_table(runs: Runs, timed: Runs) -> list[str]:
    """Returns the lines of what each row is and takes."""
    lines = ["| row | parameters | rate | seeds | updates | tokens | training |", "|---|---|---|---|---|---|---|"]
    for row, records in runs.items():
        last = records[0]["curve"][-1]
        seconds = f"{timed[row][0]['curve'][-1]['seconds']:.0f} s" if row in timed else ""
        lines.append(
            f"| {row} | {records[0]['parameters'] / 1e6:.1f} M | {records[0]['rate']:g}x | {len(records)} | "
            f"{last['update']:,} | {last['tokens'] / 1e6:.1f} M | {seconds} |"
        )
    return lines


def spread(values: list[float]) -> str:
    """Returns the mean, and half the range if there are several."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")


def losses_table(runs: Runs, times: Record, against: str = "unshared") -> list[str]:
    """Returns the lines of the losses and times at each number of evaluations."""
    counts = sorted({e["evaluations"] for records in runs.values() for r in records for e in r["evaluations"]})[::-1]
    lines = ["| row | " + " | ".join(map(str, counts)) + " |", "|---|" + "---|" * len(counts)]
    for row, records in runs.items():
        cells, shares = [], pass_shares(row, runs, times, against)
        for count in counts:
            found = [e for r in records for e in r["evaluations"] if e["evaluations"] == count]
            share = shares.get(count)
            time = f" ({share:.2f})" if found and share else ""
            cells.append(spread([e["loss"] for e in found]) + time if found else "")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def pass_shares(row: str, runs: Runs, times: Record, against: str) -> dict[int, float]:
    """Returns what a pass takes at each number of evaluations, as a share of one of `against` at full depth.

    Both are of `times`; a row that is not there has the share of its own file, if that has latencies: of the row that
    was measured beside it on the same day.
    """
    first = runs[row][0]
    if row in times and against in times:
        slowest = max(times[against]["pass_s"].values())
        return {e["evaluations"]: times[row]["pass_s"][str(e["steps"])] / slowest for e in first["evaluations"]}
    if against != "unshared":
        return {}  # a row's own latencies are comparable only with those of the row that was measured beside it
    beside = runs.get(first.get("against", against), [{"evaluations": []}])[0]
    latencies = [
        {e["evaluations"]: e["latency_ms"]["median"] for e in record["evaluations"] if "latency_ms" in e}
        for record in (first, beside)
    ]
    own, slowest = latencies[0], max(latencies[1].values(), default=0)
    return {count: value / slowest for count, value in own.items()} if slowest else {}


def quantized_table(runs: Runs) -> list[str]:
    """Returns the lines of the first seeds' losses with matrices of 8 bits, and by how much they exceed those without,
    in per cent; nothing if there are none."""
    found = {row: [e for e in records[0]["evaluations"] if "quantized" in e] for row, records in runs.items()}
    counts = sorted({e["evaluations"] for some in found.values() for e in some}, reverse=True)
    lines = ["| row | matrices | " + " | ".join(map(str, counts)) + " |", "|---|---|" + "---|" * len(counts)]
    for row, some in found.items():
        for kind in some[0]["quantized"] if some else ():
            more = {e["evaluations"]: (e["quantized"][kind], e["quantized"][kind] / e["loss"] - 1) for e in some}
            cells = [f"{more[n][0]:.3f} ({100 * more[n][1]:+.2f})" if n in more else "" for n in counts]
            lines.append(f"| {row} | {kind} | " + " | ".join(cells) + " |")
    return lines if counts else []


def stability_table(runs: Runs) -> list[str]:
    """Returns the lines of how smoothly the rows trained, the most of any seed; nothing if none was recorded."""
    found = {row: [r["stability"] for r in records if "stability" in r] for row, records in runs.items()}
    lines = ["| row | updates skipped | jumps of the loss | largest norm of the gradients |", "|---|---|---|---|"]
    for row, some in found.items():
        if some:
            skipped, jumps = (max(one[name] for one in some) for name in ("skipped", "jumps"))
            norms = [norm for one in some if (norm := one["largest_gradient_norm"]) is not None]
            lines.append(f"| {row} | {skipped} | {jumps} | {f'{max(norms):.2f}' if norms else ''} |")
    return lines if any(found.values()) else []


def by_kind(runs: Runs) -> list[Runs]:
    """Returns the decoders and the encoders apart, whose losses cannot be compared."""
    kinds = {row: records[0]["config"]["model"]["kind"] for row, records in runs.items()}
    return [{row: runs[row] for row in runs if kinds[row] == kind} for kind in sorted(set(kinds.values()))]


def equal_table(runs: Runs, by: str) -> list[str]:
    """Returns the lines of the losses at the end of the shortest row, by "seconds" or "tokens"."""
    end = min(records[0]["curve"][-1][by] for records in runs.values())
    lines = [f"At {end:,.0f} {by}:", "", f"| row | {by} | full depth | fewest steps |", "|---|---|---|---|"]
    for row, records in runs.items():
        reached = [[point for point in r["curve"] if point[by] <= end * 1.001][-1:] for r in records]
        points = [found[0] for found in reached if found]
        if not points:
            lines.append(f"| {row} | | not evaluated before | |")
            continue
        losses = [list(point["losses"].values()) for point in points]
        first, last = spread([found[0] for found in losses]), spread([found[-1] for found in losses])
        lines.append(f"| {row} | {points[0][by]:,.0f} | {first} | {last} |")
    return lines


def tasks_table(runs: Runs) -> list[str]:
    """Returns the lines of the first seeds' scores at each number of evaluations, each with its standard error."""
    rows: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for name, records in runs.items():
        for task in _tasks(records):
            rows[name, task["task"], task["metric"]].append(task)
    if not rows:
        return []
    counts = sorted({task["evaluations"] for found in rows.values() for task in found}, reverse=True)
    head = "| task | metric | row | " + " | ".join(map(str, counts)) + " | random |"
    lines = [head, "|---" * (4 + len(counts)) + "|"]
    for (name, task, metric), found in sorted(rows.items(), key=lambda item: item[0][1:]):
        share = metric in SHARES
        shown = {t["evaluations"]: _with_error(t["value"], t["stderr"], share) for t in found}
        chance = f"{found[0]['random']:.1%}" if share else ""
        cells = [task, metric, name, *(shown.get(count, "") for count in counts), chance]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def glue_table(folder: Path) -> list[str]:
    """Returns the lines of what encoders reached on GLUE at each number of evaluations, the mean over the seeds and the
    standard deviation, times 100; nothing if none was fine-tuned."""
    found: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for file in sorted(folder.glob("glue_*.json")):
        for task, results in json.loads(file.read_text()).items():
            for scored in results["rows"]:
                if scored["metric"] != "loss":
                    found[task, scored["metric"], file.stem.removeprefix("glue_")].append(scored)
    counts = sorted({one["evaluations"] for some in found.values() for one in some}, reverse=True)
    lines = ["| task | metric | row | " + " | ".join(map(str, counts)) + " | majority |"]
    lines += ["|---" * (4 + len(counts)) + "|"]
    for names, some in sorted(found.items()):
        shown, majority = {one["evaluations"]: spread_text(one) for one in some}, some[0]["majority"]
        cells = [*names, *(shown.get(count, "") for count in counts)]
        cells.append("" if majority is None else f"{100 * majority:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines if found else []


def _tasks(records: list[Record]) -> list[Record]:
    return [task for record in records for task in record.get("tasks", [])]


def _with_error(value: float, error: float, share: bool) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f} %" if share else f"{value:,.0f} ± {error:,.0f}"


def plot(runs: Runs, path: Path) -> None:
    """Draws each first seed's held-out losses against the seconds of training: at full depth, and dashed in the fewest
    steps that the row is trained with."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for i, (row, records) in enumerate(runs.items()):
        curve = records[0]["curve"]
        seconds = [point["seconds"] for point in curve]
        losses = [list(point["losses"].values()) for point in curve]
        axes.plot(seconds, [loss[0] for loss in losses], color=f"C{i}", label=row)
        if len(losses[0]) > 1 and records[0]["config"]["step_sampling"]["kind"] != "fixed":
            axes.plot(seconds, [loss[-1] for loss in losses], "--", color=f"C{i}", label=f"{row}, fewest steps")
    axes.set_xlabel(f"seconds of training on {next(iter(runs.values()))[0]['device']}")
    axes.set_ylabel("held-out loss, nats a token")
    axes.grid(alpha=0.3)
    figure.set_size_inches(9, max(4, 0.25 * len(axes.lines)))
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)


def field_table(runs: Runs) -> list[str]:
    """Returns the lines of what the trained fields look like."""
    lines = [
        "| row | field's norm, first and last unit | second difference, largest | order: Euler | Heun |",
        "|---|---|---|---|---|",
    ]
    for row, records in runs.items():
        field = records[0]["field"]
        orders, turns = field.get("observed_orders", {}), field.get("second_differences", [])
        norms = field.get("field_norms", [])
        cells = [
            f"{norms[0]:.2f}, {norms[-1]:.2f}" if norms else "",
            f"{max(turns):.2f}" if turns else "",
            *(f"{orders[name]:.2f}" if name in orders else "" for name in ("euler", "heun")),
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", default="unshared", help="the row whose pass at full depth counts as 1")
    parser.add_argument("--plot", type=Path, help="draws the curves here")
    parser.add_argument("--rows", type=several(str), help="those that are drawn; default: all with times")
    options = parser.parse_args()
    runs = read(options.folder)
    if not runs:
        parser.error(f"{options.folder} has no results of benchmarks.study")
    times = read_times(options.folder)
    if options.against != "unshared" and options.against not in times:
        known = ", ".join(times) or "no row"
        parser.error(f"{options.folder / TIMES} has no times of {options.against}; it has those of {known}")
    timed = with_seconds(runs, times)
    if options.rows and not options.plot:
        parser.error("--rows chooses what --plot draws: give --plot too")
    if options.plot and not timed:
        parser.error(f"{options.folder} has no times of any row: run benchmarks.study_times first")
    if unknown := [row for row in options.rows or () if row not in timed]:
        parser.error(f"{options.folder} has no times of {unknown[0]}; it has those of {', '.join(timed)}")
    parts = [sizes_table(runs, timed), losses_table(runs, times, options.against)]
    parts += [equal_table(some, by) for by, all_ in (("seconds", timed), ("tokens", runs)) for some in by_kind(all_)]
    parts += [tasks_table(runs), glue_table(options.folder), quantized_table(runs), stability_table(runs)]
    for part in (*parts, field_table(runs)):
        if part:
            print("\n".join(part) + "\n")
    if options.plot:
        plot({row: timed[row] for row in options.rows or timed}, options.plot)


if __name__ == "__main__":
    run_program(main)

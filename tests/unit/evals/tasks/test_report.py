"""The table and the figure of results: what they show of the rows, and what they leave out."""

import io

import pytest
from matplotlib import pyplot as plt
from rich.console import Console

import odelm
from odelm.evals.tasks.report import make_results, plot_results, print_results


def row(task: str, metric: str, steps: int, value: float, **options) -> dict:
    usual = {"evaluations": steps, "stderr": 0.02, "n": 1200, "random": 0.25, "majority": 0.3}
    return {"task": task, "metric": metric, "steps": steps, "value": value} | usual | options


@pytest.fixture
def results() -> dict:
    rows = [row("arc_easy", "acc", steps, 0.5 - 0.1 / steps) for steps in (4, 1)]
    rows += [row("blimp/island", "acc", steps, 0.9, majority=None, random=0.5) for steps in (4, 1)]
    rows += [row("blimp", "acc", steps, 0.7, majority=None, random=0.5) for steps in (4, 1)]
    rows += [row("lambada", "perplexity", 4, 12.5, majority=None), row("lambada", "perplexity", 1, 2e6, stderr=None)]
    times = [{"steps": s, "evaluations": s, "latency_ms": {"median": 2.0 * s, "p90": 3.0 * s}} for s in (4, 1)]
    config = odelm.ModelConfig(kind="decoder", vocab_size=13, width=16, heads=2, depth=4)
    return make_results(config, rows, times, source="run", files={"arc_easy": "f"}, batch=8, length=32)


def test_the_table_has_a_line_for_each_metric_and_a_column_for_each_step_count(results):
    written = io.StringIO()
    print_results(results, Console(file=written, width=160))
    lines = [line.split() for line in written.getvalue().splitlines() if line.strip()]
    assert ["task", "metric", "n", "random", "majority", "4", "steps", "1", "step"] in lines
    assert ["arc_easy", "acc", "1,200", "25.0", "30.0", "47.5", "±", "2.0", "40.0", "±", "2.0"] in lines
    assert ["blimp/island", "acc", "1,200", "50.0", "-", "90.0", "±", "2.0", "90.0", "±", "2.0"] in lines
    assert ["lambada", "perplexity", "1,200", "0.25", "-", "12.50", "±", "0.02", "2.0e+06"] in lines
    assert ["ms", "a", "batch", "8", "x", "32", "8.00", "2.00"] in lines


def test_the_figure_has_a_line_for_each_task_against_latency(results, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    plot_results(results, tmp_path / "results.png")
    (figure,) = figures
    accuracies, perplexities = figure.axes
    assert (accuracies.get_ylabel(), perplexities.get_yscale()) == ("accuracy, %", "log")
    drawn = {one.get_label(): one.lines[0].get_xydata().tolist() for one in accuracies.containers}
    assert drawn == {"arc_easy": [[8.0, 47.5], [2.0, 40.0]], "blimp": [[8.0, 70.0], [2.0, 70.0]]}
    assert [one.get_label() for one in perplexities.containers] == ["lambada"]
    guesses = [line.get_ydata()[0] for line in accuracies.lines if line.get_linestyle() == ":"]
    assert guesses == [25.0, 50.0] and not [line for line in perplexities.lines if line.get_linestyle() == ":"]
    monkeypatch.undo()
    plt.close(figure)

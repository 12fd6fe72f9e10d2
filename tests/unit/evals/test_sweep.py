"""The rows of a sweep and the report made of them."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text
from rich.console import Console

import odelm
from odelm.errors import InputError
from odelm.evals import sweep as sweeps
from odelm.evals.report import make_report, plot, print_table, write_report
from odelm.evals.sweep import Setting, settings, sweep
from odelm.infer.latency import Latency
from odelm.infer.runner import Runner
from odelm.models.loss import MeanLoss, loss_sums, mean_loss

KEYS = "steps solver evaluations batch length latency_ms tokens_per_s speedup loss perplexity loss_increase".split()


@pytest.fixture(scope="module")
def runner(make_model) -> Runner:
    return Runner.of(make_model(dtype="float32"))


@pytest.fixture
def fixed_latencies(monkeypatch):
    """Latencies of 8, 4, 2 .. ms in the order of the calls, each of which runs once."""

    def measure(calls, *, repeats):
        for call in calls.values():
            call()
        return {name: Latency(8.0 / 2**i, 9.0 / 2**i) for i, name in enumerate(calls)}

    monkeypatch.setattr(sweeps, "measure", measure)


@pytest.fixture(scope="module")
def held_out(tokens):
    uneven = np.array([[1] * 6, [1, 1, 0, 0, 0, 0]], np.float32)
    first = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": np.ones((2, 6), np.float32)}
    return [first, {**first, "tokens": tokens[::-1].copy(), "weights": uneven}]


def test_settings_put_full_depth_first_and_name_a_solver_that_adapts(runner):
    assert settings(runner, (1, 4, 2, 2), tolerance=0.1) == [
        Setting("euler", 4),
        Setting("euler", 2),
        Setting("euler", 1),
        Setting("bosh3", tolerance=0.1),
    ]
    assert settings(runner, (4,), solver="heun") == [Setting("euler", 4), Setting("heun", 4)]


def test_settings_put_diffrax_beside_the_scan_where_both_can_follow_the_solver(runner):
    full, heun = Setting("euler", 4), [Setting("heun", 2), Setting("heun", 2, integrator="diffrax")]
    assert settings(runner, (2,), solver="heun", integrator="diffrax") == [full, *heun]
    implicit = settings(runner, (2,), solver="kvaerno3", integrator="diffrax", tolerance=0.1)
    assert implicit == [full, Setting("kvaerno3", 2, integrator="diffrax"), Setting("bosh3", tolerance=0.1)]
    with pytest.raises(InputError, match="not an explicit Runge-Kutta method.*integrator='diffrax'"):
        settings(runner, (2,), solver="kvaerno3")


@pytest.mark.parametrize("groups", [1, 2])
def test_the_model_before_adaptation_makes_as_many_evaluations(groups, make_model, held_out, fixed_latencies):
    """Four layers became a core of two between a prelude and a coda: its full depth is that of the four."""
    adapted = Runner.of(make_model(dtype="float32", prelude=1, coda=1))
    before = Runner.of(make_model(dtype="float32", groups=groups))
    chosen = [Setting("euler", 2), Setting("euler", 1), Setting("heun", 1), Setting("euler", 2, grid=(0.0, 0.5, 2.0))]
    rows = sweep(adapted, chosen, batch=2, length=6, held_out=held_out, before=before)
    by_itself = sweep(before, [Setting("euler", 4)], batch=2, length=6, held_out=held_out)
    assert [row["evaluations"] for row in rows[:2]] == [4, 3]
    assert rows[0]["loss_before"] == by_itself[0]["loss"]
    assert (rows[1]["loss_before"] is None) == (groups == 2), "three steps do not spread over two groups"
    if groups == 1:
        three = sweep(before, [Setting("euler", 3)], batch=2, length=6, held_out=held_out)
        assert rows[1]["loss_before"] == three[0]["loss"]
    assert rows[2]["loss_before"] is rows[3]["loss_before"] is None


@pytest.mark.parametrize(
    ("steps", "options", "words"),
    [((0,), {}, "steps is 0"), ((2,), {"solver": "hen"}, "heun"), ((2,), {"tolerance": float("nan")}, "nan")],
)
def test_settings_refuse(runner, steps, options, words):
    with pytest.raises(odelm.InputError, match=words):
        settings(runner, steps, **options)


def test_rows_compare_with_full_depth(runner, held_out, fixed_latencies, tmp_path):
    rows = sweep(runner, settings(runner, (4, 2), tolerance=0.5), batch=2, length=6, held_out=held_out)
    full, coarse, adaptive = rows
    assert (full["speedup"], full["loss_increase"]) == (1.0, 0.0)
    assert (coarse["speedup"], coarse["evaluations"], coarse["tokens_per_s"]) == (2.0, 2, 12 / 4e-3)
    assert adaptive["steps"] is None and adaptive["tolerance"] == 0.5 and adaptive["evaluations"] > 0
    for row, steps in ((full, 4), (coarse, 2)):
        plan = runner.model.plan(grid=jnp.linspace(0, 4, steps + 1))
        sums = [loss_sums(runner.model, batch, plan=plan) for batch in held_out]
        wanted = sum(float(s.nats) for s in sums) / sum(float(s.tokens) for s in sums)
        # float32 sums of about twenty terms.
        assert row["loss"] == pytest.approx(wanted, rel=1e-5)
        assert row["perplexity"] == pytest.approx(np.exp(wanted), rel=1e-4)
        mean = mean_loss(sums)
        assert (row["loss"], row["loss_stderr"]) == pytest.approx((mean.loss, mean.stderr), rel=1e-4)
    assert coarse["loss"] != full["loss"]
    assert coarse["loss_increase"] == pytest.approx(coarse["loss"] / full["loss"] - 1)

    text = {"source": "here", "tokens": 20, "documents": 3}
    write_report(make_report(runner.model.config, rows, step=7, text=text, trained=(2, 4)), tmp_path / "infer")
    report = json.loads((tmp_path / "infer" / "report.json").read_text())
    assert {"device", "dtype", "model", "rows"} <= set(report)
    assert report["model"]["depth"] == 4 and report["model"]["trained_updates"] == 7
    trained = [row.pop("trained") for row in report["rows"]]
    assert trained == [True, True, False] and report["text"] == text
    assert report["rows"] == rows and all(set(KEYS) <= set(row) for row in rows)
    assert (tmp_path / "infer" / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_packed_documents_are_measured_apart(runner, held_out, fixed_latencies):
    segments = np.tile(np.repeat(np.arange(2, dtype=np.int32), 3), (2, 1))
    packed = {**held_out[1], "segments": segments}
    apart = {name: array.reshape(4, 3) for name, array in held_out[1].items()}
    chosen = settings(runner, (4,), tolerance=1e-4)
    together, alone = (
        [row["loss"] for row in sweep(runner, chosen, batch=1, length=6, held_out=[batch])] for batch in (packed, apart)
    )
    # float32 sums of about twenty terms; and fewer than 50 adaptive steps, chosen for rows of another shape.
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    assert together[1] == pytest.approx(alone[1], rel=50 * 1e-4)


def test_without_held_out_batches_there_are_latencies_only(runner, fixed_latencies, tmp_path):
    rows = sweep(runner, settings(runner, (2,), tolerance=0.5), batch=1, length=6, held_out=[])
    assert [row["loss"] for row in rows] == [row["loss_increase"] for row in rows] == [None] * 3
    assert rows[-1]["evaluations"] > 0
    write_report(make_report(runner.model.config, rows), tmp_path)
    assert (tmp_path / "report.json").exists() and not (tmp_path / "report.png").exists()


def test_a_tolerance_that_takes_too_many_steps_is_told(runner, held_out, capfd, caplog):
    chosen = settings(runner, (4,), tolerance=1e-12)
    with pytest.raises(odelm.InputError, match="256 steps did not reach .* tolerance 1e-12: try a larger") as caught:
        sweep(runner, chosen, batch=1, length=6, held_out=held_out, repeats=1)
    assert "\n" not in str(caught.value)
    assert not caplog.records and not capfd.readouterr().err


def strict(path) -> dict:
    """Reads JSON as others do: NaN and Infinity are not of it."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_null_and_not_drawn(runner, tmp_path, lost, value):
    losses = [value if i in lost else 2.0 + i for i in range(3)]
    means = [MeanLoss(loss, 0.1 * loss, 20) for loss in losses]
    measured = [sweeps.Measured(Latency(8.0 / 2**i, 9.0), 4, mean) for i, mean in enumerate(means)]
    rows = [sweeps.make_row(Setting("euler", 4 // 2**i), one, measured[0], 2, 6) for i, one in enumerate(measured)]
    for row in rows:
        row["loss_before"] = row["loss"]
    report = make_report(runner.model.config, rows)
    (tmp_path / "report.png").write_bytes(b"of another report")
    write_report(report, tmp_path)
    read = strict(tmp_path / "report.json")["rows"]
    assert [row["loss"] for row in read] == [None if i in lost else row["loss"] for i, row in enumerate(rows)]
    drawn = tmp_path / "report.png"
    assert drawn.read_bytes().startswith(b"\x89PNG") if len(lost) < 3 else not drawn.exists()
    print_table(report, Console(file=io.StringIO()))


def test_a_report_without_losses_takes_the_plot_of_the_last_one_away(runner, fixed_latencies, tmp_path):
    (tmp_path / "report.png").write_bytes(b"of another report")
    rows = sweep(runner, settings(runner, (4,)), batch=1, length=6, held_out=[])
    write_report(make_report(runner.model.config, rows), tmp_path)
    assert not (tmp_path / "report.png").exists()


def row_of(steps: int, loss: float, *, solver: str = "euler", ms: float, tolerance: float | None = None) -> dict:
    setting = Setting(solver, None if tolerance else steps, tolerance)
    mean = MeanLoss(loss, 0.02, 4096)
    one = sweeps.Measured(Latency(ms, ms), steps, mean)
    return sweeps.make_row(setting, one, one, 2, 6)


def test_what_the_model_was_not_trained_with_is_marked(runner):
    rows = [
        row_of(12, 3.0, ms=8), row_of(5, 3.1, ms=4), row_of(4, 3.2, ms=3), row_of(4, 3.9, solver="heun", ms=6),
        row_of(9, 4.9, solver="bosh3", ms=9, tolerance=0.1),
    ]  # fmt: skip
    text = {"source": "notes.txt", "tokens": 4096, "documents": 17}
    report = make_report(runner.model.config, rows, step=7, text=text, trained=(3, 4, 6, 12))
    assert [row["trained"] for row in report["rows"]] == [True, False, True, False, False]
    printed = io.StringIO()
    print_table(report, Console(file=printed, width=100))
    marked = [line.split()[0] for line in printed.getvalue().splitlines() if " * " in line]
    assert marked == ["5", "4", "tol"]
    assert "4,096 tokens of 17 documents of notes.txt; standard error 0.0200" in printed.getvalue()
    assert "* a count of steps, a solver or a span of keys and values that the model was not" in printed.getvalue()


def test_each_solver_is_a_line_of_its_own_and_labels_lie_apart(runner, tmp_path, monkeypatch):
    """Eight points close together, which labels above each point would cover."""
    rows = [row_of(12 - i, 3.0 + 0.001 * i, ms=8 + 0.05 * i) for i in range(5)]
    rows += [row_of(4 - i, 3.01 + 0.001 * i, solver="heun", ms=8.1 + 0.05 * i) for i in range(3)]
    rows.append(row_of(9, 3.02, solver="bosh3", ms=8.3, tolerance=0.1))
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plot(make_report(runner.model.config, rows), tmp_path / "report.png")
    (figure,) = drawn
    (axes,) = figure.axes
    lines = {line.get_label(): len(line.get_xdata()) for line in axes.get_lines()}
    assert lines == {"euler": 5, "heun": 3, "bosh3, by tolerance": 1}
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == len(rows)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in box.corners())

"""`benchmarks.scaling`: which cases there are, what is resumed, what is compared, and that all of it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import Results, cases_of, missing, parse
from benchmarks.scaling_case import Case, mesh_of
from benchmarks.scaling_report import rows_of, tables
from odelm.errors import InputError

ROOT = Path(__file__).parents[2]


def content(**seconds: float) -> dict:
    """Returns results at full depth of `tiny`, 8 rows of 64: of a case by its name, with `_` for `/`."""
    found = {}
    for name, value in seconds.items():
        case = Case.named(name.replace("_", "/"))
        rows = 8 * case.devices if case.scaling == "weak" else 8
        counts = {"4": {"seconds": value, "collectives": {"all-reduce": 10**6}}}
        found[case.name] = {"rows": rows, "length": 64, "parameters": 100, "counts": counts}
    return {"settings": {"predicted": False, "rows": 0}, "cases": found}


def test_meshes_take_all_devices():
    assert mesh_of("one", 1).axes == {"data": 1, "fsdp": 1, "tensor": 1}
    assert mesh_of("fsdp", 8).axes == {"data": 1, "fsdp": 8, "tensor": 1}
    assert mesh_of("data+tensor2", 8).axes == {"data": 4, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize("name", ["data+tensor3", "data+fsdp", "tensor2"])
def test_a_mesh_that_cannot_be_made_is_an_error(name):
    with pytest.raises(InputError, match="cannot be made of 8 devices"):
        mesh_of(name, 8)


def test_cases_are_each_model_on_each_mesh_and_one_device_once():
    options = parse(["--out=x", "--models=tiny,small", "--meshes=data,tensor"])
    names = [case.name for case in cases_of(options, [1, 2])]
    assert len(names) == len(set(names)) == 2 + 2 * 2 * 2
    assert names[:3] == ["tiny/one/1/both", "tiny/data/2/weak", "small/one/1/both"]
    options = parse(["--out=x", "--models=tiny,small", "--cases=small/data/*,*/one/*", "--scaling=weak"])
    assert [case.name for case in cases_of(options, [1, 2])] == [names[0], names[2], "small/data/2/weak"]


@pytest.mark.parametrize("option", ["--models=huge", "--meshes=date", "--scaling=week"])
def test_a_name_that_does_not_exist_is_an_error(option, capsys):
    with pytest.raises(SystemExit):
        parse(["--out=x", option])
    assert f"unknown: {option.partition('=')[2]}" in capsys.readouterr().err


def test_what_is_measured_or_failed_is_not_measured_again():
    case, options = Case("tiny", "data", 2, "weak"), parse(["--out=x"])
    assert missing(case, {}, options) == (4, 2, 1)
    assert missing(case, {"counts": {"4": {}}}, options) == (2, 1)
    assert missing(case, {"counts": {"4": {}}}, parse(["--out=x", "--full"])) == ()
    assert missing(case, {"error": "out of memory"}, options) == ()
    assert missing(case, {"error": "out of memory"}, parse(["--out=x", "--retry"])) == (4, 2, 1)


def test_results_of_other_settings_are_not_mixed(tmp_path):
    case, path, settings = Case("tiny", "data", 2, "weak"), tmp_path / "results.json", {"predicted": False, "rows": 0}
    Results(path, settings, writes=True).add(case, {"rows": 16, "counts": {"4": {"seconds": 1.0}}})
    again = Results(path, settings, writes=True)
    again.add(case, {"counts": {"2": {"seconds": 0.5}}})
    assert again.record(case) == {"rows": 16, "counts": {"4": {"seconds": 1.0}, "2": {"seconds": 0.5}}}
    assert json.loads(path.read_text())["cases"] == {case.name: again.record(case)}
    with pytest.raises(InputError, match="give another --out"):
        Results(path, settings | {"predicted": True}, writes=True)


def test_weak_scaling_is_compared_per_device_and_strong_scaling_in_all():
    found = content(tiny_one_1_both=0.1, tiny_data_4_weak=0.125, tiny_data_4_strong=0.04)
    (one,) = rows_of(Case("tiny", "one", 1, "both"), found, 1.0)
    (weak,) = rows_of(Case("tiny", "data", 4, "weak"), found, 1.0)
    (strong,) = rows_of(Case("tiny", "data", 4, "strong"), found, 1.0)
    assert one.against_one is None and one.tokens_per_s == pytest.approx(8 * 64 / 0.1) and one.share is not None
    assert weak.against_one == pytest.approx(0.8) and weak.share == pytest.approx(0.8 * one.share)
    assert strong.against_one == pytest.approx(2.5) and strong.share == pytest.approx(2.5 / 4 * one.share)
    text = "\n".join(tables(found, 1.0))
    assert "80.0% | all-reduce 1.0 MB" in text and "2.50x" in text


def test_random_counts_take_the_mean_of_their_times():
    found = content(tiny_one_1_both=0.3)
    counts = found["cases"]["tiny/one/1/both"]["counts"]
    counts |= {count: counts["4"] | {"seconds": seconds} for count, seconds in (("2", 0.2), ("1", 0.1))}
    rows = {row.steps: row for row in rows_of(Case("tiny", "one", 1, "both"), found, 1.0)}
    assert rows["random"].seconds == pytest.approx(0.2) and not rows["random"].full and rows["4 steps"].full


def test_a_prediction_has_a_column_for_each_number_of_devices():
    found = content(tiny_data_2_weak=0.1, tiny_data_8_weak=0.1)
    found["settings"]["predicted"] = True
    for record in found["cases"].values():
        del record["counts"]["4"]["seconds"]
    found["cases"]["tiny/tensor/8/weak"] = {"error": "does not divide", "counts": {}}
    lines = tables(found, 1.0)
    assert lines[0].endswith("| collective, MB | 2 devices | 8 devices |")
    assert lines[2:] == [
        "| tiny | 0.0 M | data | 4 steps | all-reduce | 1.0 | 1.0 |",
        "",
        "- tiny/tensor/8/weak failed: does not divide",
    ]


@pytest.mark.thorough
def test_the_whole_of_it_runs_and_a_data_mesh_sends_the_gradient_once(tmp_path):
    """Of two devices the gradient, 4 bytes a parameter, whatever the count of steps, and a few sums."""
    out, report = tmp_path / "results.json", tmp_path / "report.md"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    command = [sys.executable, "-m", "benchmarks.scaling", f"--out={out}", "--models=tiny", "--scaling=weak"]
    command += ["--meshes=data", "--calls=1", "--repeats=1"]
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}

    def call(*more: str) -> str:
        done = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call()
    cases = json.loads(out.read_text())["cases"]
    one, two = cases["tiny/one/1/both"], cases["tiny/data/2/weak"]
    assert set(one["counts"]) == set(two["counts"]) == {"4", "2", "1"}
    for count in two["counts"].values():
        assert count["seconds"] > 0 and count["collectives"]["all-reduce"] == pytest.approx(
            4 * two["parameters"], rel=0.01
        )
    assert "0 cases to measure" in call()
    call(f"--report={report}")
    assert "tiny | data | 2 | 16 | random" in report.read_text() and report.with_suffix(".png").exists()

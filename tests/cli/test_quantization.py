"""`infer.py --quantize`: what it measures, writes and generates, and every mistake told in one line."""

import json
import shutil

import numpy as np
import pytest

from odelm.evals import quantization
from odelm.infer.quantize import quantize
from tests.cli.test_programs import PNG, refused, report_of
from tests.thorough import few, thorough

SMALL = ["--length=16", "--repeats=2", "--eval_batches=1"]


@pytest.mark.parametrize(
    "kind, kinds", [("decoder", ["int8", "fp8_dynamic", "int8_static"]), thorough("encoder", ["int8_static"])]
)
def test_quantised_models_are_compared_with_full_depth(kind, kinds, request, call, tmp_path):
    workdir = request.getfixturevalue(kind)
    arguments = [f"--workdir={workdir}", f"--out={tmp_path}", "--steps=4,2", *SMALL]
    done = call("infer.py", *arguments, f"--quantize={','.join([*kinds, kinds[0]])}")
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path)
    rows = report["rows"]
    expected = [(name, steps) for name in (None, *kinds) for steps in (4, 2)]
    assert [(row["quantize"], row["steps"]) for row in rows] == expected
    full = rows[0]
    for row in rows:
        assert row["loss_increase"] == pytest.approx(row["loss"] / full["loss"] - 1)
        assert row["speedup"] == pytest.approx(full["latency_ms"]["median"] / row["latency_ms"]["median"])
        # A model that was trained for six updates: most of its loss is that of the token frequencies.
        assert abs(row["loss"] - rows[[4, 2].index(row["steps"])]["loss"]) < 0.05
        assert (row["bytes"] < 0.6 * full["bytes"]) == (row["quantize"] is not None)
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)
    for word in ("8 bits", "MB", "none", f"{full['bytes'] / 1e6:.2f}", *kinds):
        assert word in done.stdout
    plain = call("infer.py", *arguments)
    assert plain.returncode == 0, plain.stderr
    same = report_of(tmp_path)["rows"]
    assert [row["loss"] for row in same] == [row["loss"] for row in rows[:2]]
    assert set(rows[0]) - set(same[0]) == {"quantize", "bytes"}


@pytest.fixture
def made(monkeypatch) -> list:
    """Returns what is quantised: the kind, and the ids of the tokens that it is calibrated on."""
    calls = []

    def quantized(model, kind, *, calibration=(), **options):
        calls.append((kind, {int(id) for inputs in calibration for id in np.unique(inputs.tokens)}))
        return quantize(model, kind, **options, **(dict(calibration=calibration) if calibration else {}))

    monkeypatch.setattr(quantization, "quantize", quantized)
    return calls


@pytest.mark.thorough
def test_a_static_kind_is_calibrated_on_a_given_text(call, decoder, made, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("word1 and word2 and word3 " * 9)
    arguments = [f"--workdir={decoder}", f"--out={tmp_path}", "--steps=2", "--quantize=int8_static", *SMALL]
    done, own = call("infer.py", *arguments, f"--text={text}"), call("infer.py", *arguments)
    assert done.returncode == own.returncode == 0, done.stderr + own.stderr
    (_, of_text), (_, of_run) = made
    assert 3 < len(of_text) < 12 < len(of_run)


@pytest.mark.parametrize("kind", few(["int8", "int8_static"], "int8_static"))
def test_text_is_generated_by_the_quantised_model(kind, call, decoder, made):
    arguments = [f"--workdir={decoder}", "--prompt=word1 and", "--steps=2", "--new_tokens=8", f"--quantize={kind}"]
    first, second = call("infer.py", *arguments), call("infer.py", *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("word1 and") and len(first.stdout) > len("word1 and\n")
    assert first.stdout == second.stdout
    assert [name for name, _ in made] == [kind, kind] and bool(made[0][1]) == (kind == "int8_static")


@pytest.mark.thorough
def test_ways_to_generate_are_compared_for_the_quantised_model(call, decoder, tmp_path):
    done = call(
        "infer.py", f"--workdir={decoder}", f"--out={tmp_path}", "--generate", "--steps=2", "--new_tokens=4",
        "--quantize=int8", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "generation.json").read_text())
    assert report["quantize"] == "int8" and [row["label"] for row in report["rows"]] == ["4", "2"]
    assert "int8" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantize=int9"], ["int9", "int8"]),
        (["--quantize="], ["--quantize", "empty"]),
        (["--quantize=int8,fp8", "--prompt=a"], ["int8,fp8", "give one"]),
        (["--quantize=int8,fp8", "--generate"], ["int8,fp8", "give one"]),
        (["--quantize=int8", "--baseline=a"], ["--quantize", "--baseline"]),
        (["--quantize=int8", "--adaptive_tolerance=0.1"], ["--quantize", "--adaptive_tolerance"]),
        (["--quantize=int8", "--integrator=diffrax"], ["--quantize", "--integrator"]),
        (["--quantize=int8", "--tensor=2"], ["--quantize", "--tensor"]),
        (["--quantize=int8", "--export=a"], ["--export", "--quantize"]),
        (["--quantize=int8", "--max_loss_increase=1%"], ["--max_loss_increase", "--quantize"]),
    ],
)
def test_infer_refuses_what_does_not_go_with_quantisation(arguments, words, call, decoder):
    refused(call("infer.py", f"--workdir={decoder}", *arguments), *words)


def test_a_static_kind_needs_text(call, decoder, tmp_path):
    workdir = shutil.copytree(decoder, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["source"] = "/elsewhere/texts"
    (workdir / "config.json").write_text(json.dumps(config))
    for wanted in (["--prompt=word1"], ["--steps=2"]):
        done = call("infer.py", f"--workdir={workdir}", "--quantize=int8_static", *wanted)
        refused(done, "int8_static", "/elsewhere/texts", "--text")

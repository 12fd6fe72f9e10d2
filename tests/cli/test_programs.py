"""Train, compare, generate and resume through the command line, and every mistake told in one line."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import odelm
from tests.cli.conftest import HEADS, ROOT, program
from tests.thorough import few, thorough

PNG = b"\x89PNG\r\n\x1a\n"


def report_of(folder, name: str = "report.json") -> dict:
    return json.loads((folder / name).read_text())


def steps_of(workdir) -> list[int]:
    """Returns the updates whose loss a run has recorded."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "loss" in record]


def test_training_leaves_a_run(decoder):
    names = {path.name for path in decoder.iterdir()}
    assert {"config.json", "tokenizer.json", "metrics.jsonl", "tensorboard", "checkpoints"} <= names
    records = [json.loads(line) for line in (decoder / "metrics.jsonl").read_text().splitlines()]
    assert steps_of(decoder) == [1, 2, 3, 4, 5, 6]
    assert set(records[-1]["eval_loss"]) == {"4", "2", "1"}
    assert sorted(path.name for path in (decoder / "checkpoints").iterdir() if path.name.isdigit()) == ["3", "6"]
    assert list((decoder / "tensorboard").glob("events*"))


def test_steps_with_another_span_of_keys_and_values_are_no_trained_ones(call, decoder, tmp_path):
    options = [f"--workdir={decoder}", "--steps=4,2", "--length=8", "--eval_batches=0", "--repeats=1"]
    for flags, trained in ([], True), (["--kv_span=1"], True), (["--kv_span=2"], False):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        done = call("infer.py", *options, *flags, f"--out={out}")
        assert done.returncode == 0, done.stderr
        assert [row["trained"] for row in report_of(out)["rows"]] == [trained, trained]


@pytest.mark.parametrize("kind", few(["decoder", "encoder"], "encoder"))
def test_comparison_writes_its_report(kind, request, call, tmp_path):
    workdir = request.getfixturevalue(kind)
    done = call(
        "infer.py", f"--workdir={workdir}", f"--out={tmp_path}", "--steps=4,2", "--batch=2", "--length=16",
        "--repeats=3", "--eval_batches=2", "--adaptive_tolerance=0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path)
    assert {"device", "dtype", "model", "rows"} <= set(report)
    assert report["model"]["trained_updates"] == 6
    full, coarse, adaptive = report["rows"]
    assert (full["steps"], coarse["steps"], adaptive["steps"]) == (4, 2, None)
    assert (full["evaluations"], coarse["evaluations"]) == (4, 2)
    assert full["speedup"] == 1.0 and full["loss_increase"] == 0.0
    assert adaptive["evaluations"] >= 3
    for row in report["rows"]:
        assert row["latency_ms"]["median"] <= row["latency_ms"]["p90"]
        assert np.isclose(row["perplexity"], np.exp(row["loss"]))
        assert np.isclose(row["loss_increase"], row["loss"] / full["loss"] - 1)
        assert np.isclose(row["tokens_per_s"], 2 * 16 / row["latency_ms"]["median"] * 1e3)
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_training_and_inference_find_the_same_loss_on_the_same_text(kind, request, call, tmp_path):
    workdir = request.getfixturevalue(kind)
    done = call("infer.py", f"--workdir={workdir}", f"--out={tmp_path}", "--repeats=1", "--dtype=float32")
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path)
    *_, logged = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    text = report["text"]
    assert (text["tokens"], text["documents"]) == (logged["eval_tokens"], logged["eval_documents"])
    assert f"{text['tokens']:,} tokens of {text['documents']:,} documents" in done.stdout
    for row in report["rows"]:
        assert row["length"] == 16
        # Sums of a hundred float32 terms in batches of other sizes.
        assert row["loss"] == pytest.approx(logged["eval_loss"][str(row["steps"])], rel=1e-6)
        assert row["loss_stderr"] == pytest.approx(logged["eval_stderr"][str(row["steps"])], rel=1e-3)
        assert 0 < row["loss_stderr"] < 1


def test_a_run_whose_text_is_elsewhere_is_timed(call, decoder, tmp_path):
    workdir = shutil.copytree(decoder, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["source"] = "/elsewhere/texts"
    (workdir / "config.json").write_text(json.dumps(config))
    done = call("infer.py", f"--workdir={workdir}", "--steps=2", "--repeats=1")
    assert done.returncode == 0, done.stderr
    assert "no losses: the run's text cannot be read" in done.stderr and "/elsewhere/texts" in done.stderr
    report = report_of(workdir / "infer")
    assert report["text"] is None and all(row["loss"] is None for row in report["rows"])
    text = tmp_path / "notes.txt"
    text.write_text("word1 and word2 and word3 " * 9)
    done = call("infer.py", f"--workdir={workdir}", "--steps=2", "--repeats=1", f"--text={text}")
    assert done.returncode == 0 and report_of(workdir / "infer")["text"]["documents"] == 1, done.stderr


def test_a_text_of_ones_own_is_held_out(call, small, tmp_path):
    lines = [json.dumps({"body": f"word{i} and word{i + 1} and"}) for i in range(7)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    options = [f"--config.data.valid_source={tmp_path / 'own.jsonl'}", "--config.train.updates=1"]
    options += ["--config.data.text_field=body", "--config.step_sampling.counts=2"]
    done = call("train.py", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *small, *options)
    assert done.returncode == 0, done.stderr
    assert "full depth, 4 steps, is never drawn" in done.stdout
    *_, logged = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert logged["eval_documents"] == 7
    done = call("infer.py", f"--workdir={tmp_path / 'run'}", "--steps=4", "--repeats=1")
    text = report_of(tmp_path / "run" / "infer")["text"]
    assert text == {"source": str(tmp_path / "own.jsonl"), "tokens": logged["eval_tokens"], "documents": 7}
    missing = "--config.data.valid_source=/nowhere.txt"
    done = call("train.py", "--config=configs/tiny.py", f"--workdir={tmp_path / 'other'}", *small, missing)
    refused(done, "data.valid_source", "/nowhere.txt")
    assert not (tmp_path / "other").exists()


@pytest.mark.thorough
def test_other_solver_and_dtype(decoder, call, tmp_path):
    done = call(
        "infer.py", f"--workdir={decoder}", f"--out={tmp_path}", "--steps=2", "--solver=heun", "--dtype=bfloat16",
        "--length=16", "--repeats=2", "--eval_batches=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path)
    assert report["dtype"] == "bfloat16"
    assert [(row["solver"], row["evaluations"]) for row in report["rows"]] == [("euler", 4), ("heun", 4)]


@pytest.mark.parametrize(
    ("solver", "steps", "rows"),
    [
        ("heun", "2", [("euler", "scan"), ("heun", "scan"), ("heun", "diffrax")]),
        thorough("implicit_euler", "16", [("euler", "scan"), ("implicit_euler", "diffrax")]),
    ],
)
def test_diffrax_crosses_a_run_too(solver, steps, rows, call, decoder, tmp_path):
    done = call(
        "infer.py", f"--workdir={decoder}", f"--steps={steps}", f"--solver={solver}", "--integrator=diffrax",
        "--length=8", "--repeats=1", "--eval_batches=1", f"--out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [(row["solver"], row["integrator"]) for row in found] == rows
    assert all(np.isfinite(row["loss"]) for row in found)
    # An implicit solver iterates as often as it must.
    assert (found[-1]["evaluations"] is None) == (solver == "implicit_euler")
    if solver == "heun":
        # The same method on the same grid: sums in another order.
        assert np.isclose(found[1]["loss"], found[2]["loss"], rtol=1e-5)


def test_a_run_is_resumed_by_its_own_config(call, decoder, tmp_path):
    workdir = shutil.copytree(decoder, tmp_path / "run")
    done = call("train.py", f"--workdir={workdir}")
    assert done.returncode == 0 and "already finished: 6 updates" in done.stdout, done.stderr
    done = call("train.py", f"--workdir={workdir}", "--config.train.updates=7")
    assert done.returncode == 0 and "resumed after update 6" in done.stdout, done.stderr
    assert steps_of(workdir) == [1, 2, 3, 4, 5, 6, 7]
    refused(call("train.py", f"--workdir={workdir}", "--config.model.width=64"), "model.width: 32 -> 64")
    refused(call("train.py", f"--workdir={tmp_path / 'none'}"), "no run to resume", "--config")
    assert not (tmp_path / "none").exists()


@pytest.mark.thorough
def test_a_model_with_prelude_and_coda_is_trained_and_compared(call, small, tmp_path):
    ends = ["--config.model.depth=6", "--config.model.prelude=1", "--config.model.coda=1"]
    ends += ["--config.train.updates=1", "--config.step_sampling.counts=2"]
    done = call("train.py", "--config=configs/tiny.py", f"--workdir={tmp_path}", *small, *ends)
    assert done.returncode == 0, done.stderr
    done = call("infer.py", f"--workdir={tmp_path}", "--length=16", "--repeats=1", "--eval_batches=1")
    assert done.returncode == 0, done.stderr
    rows = report_of(tmp_path / "infer")["rows"]
    assert [(row["steps"], row["evaluations"]) for row in rows] == [(4, 6), (1, 3)]
    done = call("infer.py", f"--workdir={tmp_path}", "--prompt=word1", "--steps=2", "--new_tokens=2")
    assert done.returncode == 0 and done.stdout.startswith("word1"), done.stderr


def test_generates_text(decoder, call):
    arguments = [f"--workdir={decoder}", "--prompt=word1 and", "--steps=2", "--new_tokens=8"]
    # The first as a user starts it.
    first, second = program("infer.py", *arguments), call("infer.py", *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("word1 and") and len(first.stdout) > len("word1 and\n")
    assert first.stdout == second.stdout
    limit = odelm.load(decoder)[1].model.max_length
    long = call("infer.py", *arguments[:3], f"--new_tokens={2 * limit}", "--window=8", "--top_k=0")
    assert long.returncode == 0 and len(long.stdout) > 2 * limit, long.stderr


def test_a_second_process_finds_the_programs_that_the_first_compiled(decoder, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    cache = tmp_path / "compiled"
    arguments = [f"--workdir={decoder}", "--prompt=word1 and", "--steps=2", "--new_tokens=8"]
    kept = []
    for _ in range(2):
        done = program("infer.py", *arguments, f"--compilation_cache={cache}")
        assert done.returncode == 0, done.stderr
        kept.append(sorted(path.name for path in cache.rglob("*") if path.is_file() and "-atime" not in path.name))
    assert kept[0] and kept[1] == kept[0]


@pytest.mark.thorough
def test_ways_to_generate_are_compared(decoder, call, tmp_path):
    done = call(
        "infer.py", f"--workdir={decoder}", f"--out={tmp_path}", "--generate", "--steps=2", "--prefill_steps=4",
        "--kv_span=2", "--speculative", "--draft_steps=1", "--draft_length=2", "--new_tokens=6", "--length=16",
        "--repeats=5", "--eval_batches=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "generation.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["4", "2", "4, then 2", "draft 1 x 2", "4, span 2"]
    assert rows[4]["memory_bytes"] == rows[1]["memory_bytes"] and rows[4]["loss"] not in (rows[0]["loss"], None)
    assert {row["kernel"] for row in rows} == {"xla"} and "decoded by xla (" in done.stdout
    assert (tmp_path / "generation.png").read_bytes().startswith(PNG)
    assert "ms/token" in done.stdout and "draft 1 x 2" in done.stdout and "second halves" in done.stdout


def test_another_run_is_compared_at_equal_latency(decoder, encoder, call, tmp_path):
    arguments = [f"--workdir={decoder}", f"--out={tmp_path}", "--length=16", "--repeats=2", "--eval_batches=1"]
    done = call("infer.py", *arguments, "--steps=4,1", f"--baseline={decoder}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "baseline.json").read_text())
    assert [row["steps"] for row in report["rows"]] == [4, 1]
    assert [row["steps"] for row in report["baseline_rows"]] == [4, 2, 1]
    by_steps = {row["steps"]: row["loss"] for row in report["baseline_rows"]}
    assert all(row["loss"] == by_steps[row["steps"]] for row in report["rows"])
    for rows in (report["rows"], report["baseline_rows"]):
        assert [row["loss_increase"] == row["loss"] / rows[0]["loss"] - 1 for row in rows] == [True] * len(rows)
        assert rows[0]["speedup"] == 1
    assert (tmp_path / "baseline.png").read_bytes().startswith(PNG)
    own = {row["steps"]: row["trained"] for row in report["rows"]}
    assert [own[row["steps"]] for row in report["baseline_rows"] if row["steps"] in own] == list(own.values())
    assert done.stdout.count("speed-up") == done.stdout.count("difference") == 2
    refused(call("infer.py", *arguments, f"--baseline={encoder}"), "another kind of model")


@pytest.mark.thorough
def test_a_baseline_is_what_it_is_by_itself(decoder, call, tmp_path):
    """A bundle was trained as its run was, options of the model are not the baseline's, and a profile has a row."""
    run, out = shutil.copytree(decoder, tmp_path / "run"), tmp_path / "out"
    timed = ["--length=16", "--repeats=1", "--eval_batches=1"]
    assert call("infer.py", f"--workdir={run}", f"--export={tmp_path / 'bundle'}", "--steps=none").returncode == 0
    found = {}
    for name in ("run", "bundle"):
        done = call(
            "infer.py", f"--workdir={run}", f"--baseline={tmp_path / name}", f"--out={out}", "--steps=4", *timed
        )
        assert done.returncode == 0, done.stderr
        report = json.loads((out / "baseline.json").read_text())
        found[name] = [(row["steps"], row["trained"], row["loss"]) for row in report["baseline_rows"]]
    assert found["bundle"] == found["run"] and found["run"][0][1]

    arguments = [f"--workdir={run}", f"--baseline={run}", f"--out={out}", *timed]
    assert call("infer.py", *arguments, "--steps=4", "--kv_span=2").returncode == 0
    report = json.loads((out / "baseline.json").read_text())
    assert (report["model"]["kv_span"], report["baseline_model"]["kv_span"]) == (2, 1)
    assert not any(row["trained"] for row in report["rows"]) and report["baseline_rows"][0]["trained"]

    assert call("infer.py", f"--workdir={run}", "--max_loss_increase=90%", *timed).returncode == 0
    profile = json.loads((run / "profile.json").read_text())
    assert call("infer.py", *arguments).returncode == 0
    (row,) = [row for row in json.loads((out / "baseline.json").read_text())["rows"] if row["chosen"]]
    assert row["steps"] == len(profile["grid"]) - 1


@pytest.mark.thorough
def test_drafts_leave_the_text_as_it_is(decoder, call, tmp_path):
    (tmp_path / "prompt.txt").write_text("word1 and", encoding="utf-8-sig")
    arguments = [
        f"--workdir={decoder}",
        f"--prompt_file={tmp_path / 'prompt.txt'}",
        "--new_tokens=8",
        "--temperature=0",
    ]
    plain = call("infer.py", *arguments, "--steps=4")
    chosen = call("infer.py", *arguments, "--speculative")
    given = call("infer.py", *arguments, "--speculative", "--draft_steps=1", "--draft_length=3")
    assert plain.stdout == chosen.stdout == given.stdout and plain.stdout.startswith("word1 and")
    assert "draft" in chosen.stderr and "draft" not in given.stderr
    before = call("infer.py", *arguments, "--steps=2", "--prefill_steps=4")
    assert before.returncode == 0 and before.stdout.startswith("word1 and")


def test_finished_run_is_left_alone(decoder, small, call, tmp_path):
    workdir = shutil.copytree(decoder, tmp_path / "run")
    before = (workdir / "metrics.jsonl").read_text()
    done = call("train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *small)
    assert done.returncode == 0, done.stderr
    assert "already finished: 6 updates" in done.stdout
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "recipe", "options"), [("decoder", "tiny", []), ("encoder", "tiny_encoder", HEADS)])
def test_a_run_is_resumed_by_its_command(kind, recipe, options, request, call, small, tmp_path):
    workdir = shutil.copytree(request.getfixturevalue(kind), tmp_path / "run")
    command = [f"--config=configs/{recipe}.py", f"--workdir={workdir}", *small, *options, "--config.train.updates=8"]
    done = call("train.py", *command)
    assert done.returncode == 0, done.stderr
    assert "resumed after update 6" in done.stdout
    assert steps_of(workdir) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (workdir / "checkpoints" / "8").is_dir()


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_no_success_and_is_resumed(call, small, tmp_path, number):
    command = ["--config=configs/tiny.py", f"--workdir={tmp_path}", *small]
    endless = [sys.executable, "train.py", *command, "--config.train.updates=1000000"]
    with subprocess.Popen(endless, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        wait_for_update(running, tmp_path)
        running.send_signal(number)
        output = running.communicate(timeout=120)[0]
    assert running.returncode == 128 + number, output
    last = steps_of(tmp_path)[-1]
    assert f"interrupted after update {last}; run the same command to resume" in output
    done = call("train.py", *command, f"--config.train.updates={last + 1}")
    assert done.returncode == 0, done.stderr
    assert f"resumed after update {last}" in done.stdout
    assert steps_of(tmp_path) == list(range(1, last + 2))


def wait_for_update(running, workdir, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not (workdir / "metrics.jsonl").is_file() or not steps_of(workdir):
        assert running.poll() is None and time.monotonic() < end, "no update was recorded"
        time.sleep(0.1)


def refused(done, *words: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    # Whichever test comes first prepares the text.
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("prepared text:")]
    assert len(lines) == 1 and lines[0].startswith("error:"), done.stderr
    for word in words:
        assert word in lines[0], done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/tiny.py", "--config.model.widht=3"], ["widht", "width"]),
        (["--config=configs/tiny.py", "--slice="], ["--slice is ''", "v5e:16x16"]),
        (["--config=configs/tiny.py", "--config.model.width=abc"], ["model.width", "abc"]),
        (["--config=configs/tiny.py", "--config.model.heads=5"], ["model.heads", "5", "128"]),
        (["--config=configs/tiny.py", "--config.model.dtype=float16"], ["model.dtype", "float16", "bfloat16"]),
        (["--config=configs/tiny.py", "--config.model.prelude=12"], ["model.prelude", "12"]),
        (["--config=configs/tiny.py", "--config.model.norm=rms"], ["model.norm", "rmsnorm"]),
        (["--config=configs/tiny_grouped.py", "--config.step_sampling.counts=3,4"], ["groups", "4"]),
        (["--config=configs/tiny.py", "--config.train.length=999"], ["train.length", "999", "256"]),
        (["--config=configs/tiny.py", "--config.optimizer.learning_rate=nan"], ["learning_rate", "nan", "finite"]),
        (["--config=configs/absent.py"], ["absent.py"]),
        (["--config=configs/decoder_small.py"], ["data.source"]),
        (["--config=configs/tiny.py", "--config.data.corpus=text", "--config.data.source=/absent"], ["/absent"]),
        (["--config=configs/tiny.py", "extra"], ["extra"]),
        (["--config=README.md"], ["README.md", "line 6", "SyntaxError"]),
        (["--config=odelm/version.py"], ["version.py", "get_config"]),
        (["--config=configs/tiny.py", "--workdir="], ["--workdir", "empty"]),
        ([], ["no run to resume", "--config"]),
    ],
)
def test_train_refuses(arguments, words, call, tmp_path):
    workdir = tmp_path / "run"
    cache = [f"--config.data.data_dir={tmp_path}"] if arguments else []
    refused(call("train.py", f"--workdir={workdir}", *arguments, *cache), *words)
    assert not workdir.exists()


def test_a_refusal_is_one_line_in_a_terminal_too(tmp_path):
    refused(program("train.py", f"--workdir={tmp_path / 'run'}", "--config=README.md"), "README.md")


@pytest.mark.parametrize(
    ("recipe", "wrong", "words"),
    [
        ("tiny_encoder", ["--config.train.length=2"], ["2 tokens", "train.length"]),
        ("tiny", ["--config.train.length=9999", "--config.model.max_length=9999"],
         ["training split", "train.length"]),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_the_workdir_to_the_corrected_command(
    recipe, wrong, words, call, decoder, small, tmp_path
):
    workdir = tmp_path / "run"
    refused(call("train.py", f"--config=configs/{recipe}.py", f"--workdir={workdir}", *small, *wrong), *words)
    assert not workdir.exists()


def test_train_refuses_a_workdir_that_is_not_utf_8(call, small, tmp_path):
    refused(call("train.py", "--config=configs/tiny.py", f"--workdir={tmp_path}/a\udcff", *small), "is not UTF-8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/below/it", "run/checkpoints"])
def test_train_refuses_a_workdir_that_cannot_be(place, call, small, tmp_path):
    (tmp_path / "file").touch()
    workdir = tmp_path / place
    if place.startswith("run"):
        workdir = tmp_path / "run"
        workdir.mkdir()
        (workdir / "checkpoints").touch()
    done = call("train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *small)
    refused(done, str(tmp_path / place.split("/below")[0]))


def test_train_refuses_a_data_dir_that_is_a_file(call, small, tmp_path):
    (tmp_path / "file").touch()
    options = [*small, f"--config.data.data_dir={tmp_path / 'file'}"]
    refused(call("train.py", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *options), "data.data_dir")


def test_train_refuses_another_run(call, decoder, small):
    before = (decoder / "config.json").read_bytes()
    changed = ["--config.model.width=64", "--config.model.heads=4"]
    done = call("train.py", "--config=configs/tiny.py", f"--workdir={decoder}", *small, *changed)
    refused(done, "model.width: 32 -> 64", "--workdir")
    assert (decoder / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps=a"], ["--steps", "whole numbers"]),
        (["--steps=0"], ["0"]),
        (["--solver=hen"], ["hen", "heun"]),
        (["--length=999"], ["999", "32"]),
        (["--dtype=float12"], ["float12", "float16"]),
        (["--adaptive_tolerance=-1"], ["-1"]),
        (["--prompt="], ["prompt"]),
        (["--prompt=a", "--new_tokens=99"], ["99", "32"]),
        (["--steps="], ["--steps", "empty"]),
        (["--adaptive_tolerance=1e-12", "--eval_batches=0", "--repeats=1"], ["1e-12", "256 steps", "larger"]),
        (["--prompt=a", f"--seed={10**26}"], ["seed"]),
        (["--prompt=a", "--temperature=nan"], ["temperature"]),
        (["--workdir="], ["--workdir", "empty"]),
        (["--model="], ["--model", "empty"]),
        (["--text="], ["--text", "empty"]),
        (["--out="], ["--out", "empty"]),
        (["--speculative"], ["--speculative", "--generate"]),
        (["--kernel=persistent"], ["--kernel", "--generate"]),
        (["--prompt=a", "--new_tokens=4", "--kernel=persistent"], ["kernel 'persistent' cannot decode this", "'auto'"]),
        (["--prompt=a", "--kernel=launches", "--speculative"], ["--kernel=launches takes no --speculative"]),
        (["--prompt=a", "--kernel=launches", "--integrator=diffrax"], ["memory", "integrator"]),
        (["--kv_span=2,4"], ["--kv_span has 2 values", "--generate"]),
        (["--kv_span=half", "--generate"], ["--kv_span is 'half'"]),
        (["--kv_span=2", "--solver=heun"], ["kv_span is 2", "Euler"]),
        (["--prompt=a", "--draft_steps=2"], ["--draft_steps", "--speculative"]),
        (["--prompt=a", "--prompt_file=b"], ["give one"]),
        (["--window=4"], ["--window is of a text that is continued", "--prompt"]),
        (["--prompt=a", "--window=4", "--speculative"], ["--window and --speculative", "leave out one"]),
        (["--prompt=a", "--window=4", "--early_exit=0.1"], ["--window and --early_exit", "leave out one"]),
        (["--prompt=a", "--window=4", "--integrator=diffrax"], ["--window and --integrator", "leave out one"]),
        (["--generate", "--profile_file=p"], ["--profile_file and --generate", "leave out one"]),
        (["--prompt=a", "--profile_file=p", "--solver=heun"], ["--profile_file and --solver", "leave out one"]),
        (["--prompt=a", "--profile_file=p", "--speculative"], ["--profile_file and --speculative", "leave out one"]),
        (["--prompt=a", "--window=4000"], ["window is 4000, expected 1 to model.max_length"]),
        (["--prompt_file=missing"], ["missing", "cannot be read"]),
        (["--prompt=a\udcff"], ["prompt 0 is not UTF-8"]),
        (["--prompt=a\udcff", "--integrator=diffrax"], ["prompt 0 is not UTF-8"]),
        (["--prompt=a", "--speculative", "--solver=heun"], ["--solver"]),
        (["--prompt=a", "--speculative", "--prefill_steps=2"], ["prefill_steps"]),
        (["--prompt=a", "--text=missing"], ["--prompt", "--text"]),
        (["--generate", "--baseline=a"], ["--generate", "--baseline", "give one"]),
        (["--prompt=a", "--baseline=a"], ["--prompt", "--baseline", "give one"]),
        (["--baseline=missing"], ["missing is not a directory", "a bundle, a Hugging Face folder"]),
        (["--baseline=a", "--integrator=diffrax"], ["--integrator"]),
        (["--generate", "--new_tokens=1"], ["new_tokens", "at least 2"]),
        (["--generate", "--batch=3000000", "--new_tokens=4"], ["3000000 rows", "bytes, but its device has"]),
    ],
)
def test_infer_refuses(arguments, words, call, decoder):
    refused(call("infer.py", f"--workdir={decoder}", "--length=16", *arguments), *words)


def test_infer_refuses_a_report_where_a_file_is(call, decoder, tmp_path):
    run = shutil.copytree(decoder, tmp_path / "run", ignore=shutil.ignore_patterns("infer"))
    (run / "infer").touch()
    options = ["--steps=2", "--length=16", "--repeats=1", "--eval_batches=0"]
    refused(call("infer.py", f"--workdir={run}", *options), "infer", "--out")


def test_a_process_of_no_job_is_refused(call, tmp_path):
    command = f"--workdir={tmp_path}", "--config=tiny", "--process_id=0"
    refused(call("train.py", *command), "--process_id", "needs --distributed")


def test_a_damaged_checkpoint_is_told_in_one_line(decoder, call, tmp_path):
    run = shutil.copytree(decoder, tmp_path / "run")
    command = f"--workdir={run}", "--steps=2", "--length=16", "--repeats=1", "--eval_batches=0"
    shutil.rmtree(run / "checkpoints" / "6" / "params" / "d")
    done = call("infer.py", *command)
    # It compares with what is whole, and says so in a line; only training moves what is damaged.
    assert done.returncode == 0 and done.stderr.startswith(f"checkpoint 6 of {run} is damaged, params/d/"), done.stderr
    assert done.stderr.splitlines()[0].endswith(": takes step 3") and (run / "checkpoints" / "6").is_dir()
    shutil.rmtree(run / "checkpoints" / "3" / "params" / "d")
    refused(call("infer.py", *command), "checkpoint 6", str(run), "cannot be read")


def test_training_resumes_from_the_checkpoint_before_a_damaged_one(call, decoder, small, tmp_path):
    run = shutil.copytree(decoder, tmp_path / "run")
    for path in (run / "checkpoints" / "6" / "optimizer").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    command = ["--config=configs/tiny.py", f"--workdir={run}", *small, "--config.train.updates=7"]
    done = call("train.py", *command)
    assert done.returncode == 0 and "resumed after update 3" in done.stdout, done.stderr
    told = done.stdout.splitlines()[0]
    assert f"checkpoint 6 of {run} is damaged, the checksum of optimizer/" in told and "takes step 3" in told
    assert (run / "damaged" / "6").is_dir()


@pytest.mark.thorough
def test_infer_refuses_steps_that_do_not_fit_the_groups(call, small, tmp_path):
    options = ["--config.model.groups=2", "--config.train.updates=1", "--config.train.eval_batches=1"]
    done = call("train.py", "--config=configs/tiny.py", f"--workdir={tmp_path}", *small, *options)
    assert done.returncode == 0, done.stderr
    refused(call("infer.py", f"--workdir={tmp_path}", "--steps=4,3", "--length=16"), "3", "2 groups", "try 4")


def test_infer_refuses_a_prompt_for_an_encoder(call, encoder):
    refused(call("infer.py", f"--workdir={encoder}", "--prompt=a"), "encoder")


def test_infer_refuses_what_is_no_run(call, decoder, tmp_path):
    refused(call("infer.py", f"--workdir={tmp_path / 'absent'}"), "absent")
    refused(call("infer.py", f"--workdir={tmp_path}"), "config.json")
    shutil.copytree(decoder, tmp_path / "half", ignore=shutil.ignore_patterns("checkpoints"))
    refused(call("infer.py", f"--workdir={tmp_path / 'half'}"), "checkpoint")
    (tmp_path / "half" / "checkpoints").mkdir()
    refused(call("infer.py", f"--workdir={tmp_path / 'half'}"), "checkpoint")
    config = tmp_path / "half" / "config.json"
    config.write_text(config.read_text()[:100])
    refused(call("infer.py", f"--workdir={tmp_path / 'half'}"), "JSON")

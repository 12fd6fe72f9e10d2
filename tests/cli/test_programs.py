"""Train, compare, generate and resume through the command line, and every mistake told in one line."""

import json
import shutil

import numpy as np
import pytest

from tests.cli.conftest import program

PNG = b"\x89PNG\r\n\x1a\n"


def report_of(workdir) -> dict:
    return json.loads((workdir / "infer" / "report.json").read_text())


def test_training_leaves_a_run(decoder):
    names = {path.name for path in decoder.iterdir()}
    assert {"config.json", "tokenizer.json", "metrics.jsonl", "tensorboard", "checkpoints"} <= names
    records = [json.loads(line) for line in (decoder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert set(records[-1]["eval_loss"]) == {"4", "2", "1"}
    assert sorted(path.name for path in (decoder / "checkpoints").iterdir() if path.name.isdigit()) == ["3", "6"]
    assert list((decoder / "tensorboard").glob("events*"))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_comparison_writes_its_report(kind, request):
    workdir = request.getfixturevalue(kind)
    done = program(
        "infer.py", f"--workdir={workdir}", "--steps=4,2", "--batch=2", "--length=16", "--repeats=3",
        "--eval_batches=2", "--adaptive_tolerance=0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = report_of(workdir)
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
    assert (workdir / "infer" / "report.png").read_bytes().startswith(PNG)


def test_other_solver_and_dtype(decoder):
    done = program(
        "infer.py", f"--workdir={decoder}", "--steps=2", "--solver=heun", "--dtype=bfloat16", "--length=16",
        "--repeats=2", "--eval_batches=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = report_of(decoder)
    assert report["dtype"] == "bfloat16"
    assert [(row["solver"], row["evaluations"]) for row in report["rows"]] == [("euler", 4), ("heun", 4)]


def test_generates_text(decoder):
    arguments = [f"--workdir={decoder}", "--prompt=word1 and", "--steps=2", "--new_tokens=8"]
    first, second = program("infer.py", *arguments), program("infer.py", *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("word1 and") and len(first.stdout) > len("word1 and\n")
    assert first.stdout == second.stdout


def test_finished_run_is_left_alone(decoder, small):
    before = (decoder / "metrics.jsonl").read_text()
    done = program("train.py", "--config=configs/tiny.py", f"--workdir={decoder}", *small)
    assert done.returncode == 0, done.stderr
    assert "already finished: 6 updates" in done.stdout
    assert (decoder / "metrics.jsonl").read_text() == before


def refused(done, *words: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error:"), done.stderr
    for word in words:
        assert word in lines[0], done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/tiny.py", "--config.model.widht=3"], ["widht", "width"]),
        (["--config=configs/tiny.py", "--config.model.width=abc"], ["model.width", "abc"]),
        (["--config=configs/tiny.py", "--config.model.heads=5"], ["model.heads", "5", "128"]),
        (["--config=configs/tiny.py", "--config.model.norm=rms"], ["model.norm", "rmsnorm"]),
        (["--config=configs/tiny_grouped.py", "--config.step_sampling.counts=3,4"], ["groups", "4"]),
        (["--config=configs/tiny.py", "--config.train.length=999"], ["train.length", "999", "256"]),
        (["--config=configs/tiny.py", "--config.optimizer.learning_rate=nan"], ["learning_rate", "nan", "finite"]),
        (["--config=configs/absent.py"], ["absent.py"]),
        (["--config=configs/decoder_small.py"], ["data.source"]),
        (["--config=configs/tiny.py", "--config.data.corpus=text", "--config.data.source=/absent"], ["/absent"]),
        (["--config=configs/tiny.py", "extra"], ["extra"]),
        ([], ["config"]),
    ],
)
def test_train_refuses(arguments, words, tmp_path):
    workdir = tmp_path / "run"
    cache = [f"--config.data.data_dir={tmp_path}"] if arguments else []
    done = program("train.py", f"--workdir={workdir}", *arguments, *cache)
    refused(done, *words)
    assert not workdir.exists()


def test_train_refuses_another_run(decoder, small):
    before = (decoder / "config.json").read_bytes()
    changed = ["--config.model.width=64", "--config.model.heads=4"]
    done = program("train.py", "--config=configs/tiny.py", f"--workdir={decoder}", *small, *changed)
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
    ],
)
def test_infer_refuses(arguments, words, decoder):
    refused(program("infer.py", f"--workdir={decoder}", "--length=16", *arguments), *words)


def test_infer_refuses_steps_that_do_not_fit_the_groups(small, tmp_path):
    options = ["--config.model.groups=2", "--config.train.updates=1", "--config.train.eval_batches=1"]
    done = program("train.py", "--config=configs/tiny.py", f"--workdir={tmp_path}", *small, *options)
    assert done.returncode == 0, done.stderr
    refused(program("infer.py", f"--workdir={tmp_path}", "--steps=4,3", "--length=16"), "3", "2 groups", "try 4")


def test_infer_refuses_a_prompt_for_an_encoder(encoder):
    refused(program("infer.py", f"--workdir={encoder}", "--prompt=a"), "encoder")


def test_infer_refuses_what_is_no_run(decoder, tmp_path):
    refused(program("infer.py", f"--workdir={tmp_path / 'absent'}"), "absent")
    refused(program("infer.py", f"--workdir={tmp_path}"), "config.json")
    shutil.copytree(decoder, tmp_path / "half", ignore=shutil.ignore_patterns("checkpoints"))
    refused(program("infer.py", f"--workdir={tmp_path / 'half'}"), "checkpoint")
    (tmp_path / "half" / "checkpoints").mkdir()
    refused(program("infer.py", f"--workdir={tmp_path / 'half'}"), "checkpoint")
    config = tmp_path / "half" / "config.json"
    config.write_text(config.read_text()[:100])
    refused(program("infer.py", f"--workdir={tmp_path / 'half'}"), "JSON")

"""Fine-tuning through the command line: several seeds, what they leave, and what is done with it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import odelm
from odelm.data.examples import read_task_data
from tests.cli.conftest import ROOT, trained
from tests.cli.test_documents import blocks
from tests.cli.test_programs import PNG, refused, report_of
from tests.small_task import write_rte
from tests.thorough import thorough

SMALL = [
    "--config.data.task=rte", "--config.train.updates=2", "--config.train.length=12", "--config.train.batch_size=4",
    "--config.train.eval_steps=2", "--config.train.unroll=false", "--config.step_sampling.counts=2,4",
    "--config.model.dropout=0",
]  # fmt: skip


@pytest.fixture(scope="session")
def options(encoder, once) -> list[str]:
    """Returns the options of a small fine-tuning that starts from an encoder."""
    source = once("rte", lambda folder: write_rte(folder) and None)
    return [*SMALL, f"--config.data.source={source}", f"--config.init.from_pretrained={encoder}"]


@pytest.fixture(scope="session")
def classifier(options, once) -> Path:
    """Returns a finished run, which no test may change."""
    return once("classifier", lambda workdir: trained(workdir, "glue", *options))


def evaluated(workdir: Path) -> dict:
    """Returns the last record of an evaluation."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "eval_metrics" in record][-1]


@pytest.mark.thorough
def test_several_seeds_are_trained_and_summed_up(call, options, tmp_path):
    command = ["train.py", "--config=glue", f"--workdir={tmp_path}", *options]
    command += ["--config.step_sampling.counts=2"]
    done = call(*command, "--seeds=2", "--config.train.seed=5")
    assert done.returncode == 0, done.stderr
    assert "seed 6, 2 of 2" in done.stdout and "mean ± standard deviation over 2 seeds (5, 6)" in done.stdout
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["metric"], row["steps"]) for row in rows] == [
        ("accuracy", 4),
        ("accuracy", 2),
        ("loss", 4),
        ("loss", 2),
    ]
    found = [evaluated(tmp_path / f"seed-{seed}")["eval_metrics"]["2"]["accuracy"] for seed in (5, 6)]
    assert rows[1]["values"] == found and rows[1]["mean"] == np.mean(found)
    assert (rows[1]["n"], rows[1]["majority"], rows[1]["seeds"]) == (10, 0.6, [5, 6])
    losses = rows[3]["values"]
    assert losses[0] != losses[1], "seeds differ"
    assert (tmp_path / "results.png").read_bytes().startswith(PNG)
    # Without a recipe it is resumed by what the seeds have, and a finished seed is left alone.
    (tmp_path / "results.json").unlink()
    done = call("train.py", f"--workdir={tmp_path}", "--seeds=2")
    assert done.returncode == 0 and done.stdout.count("already finished: 2 updates") == 2, done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    refused(call("train.py", f"--workdir={tmp_path}"), "holds runs of the seeds 5, 6", "--seeds")
    refused(call(*command, "--config.model.dropout=0.5", "--seeds=2", "--config.train.seed=5"), "model.dropout")


@pytest.mark.thorough
def test_seeds_need_a_directory_of_their_own(call, classifier):
    refused(call("train.py", f"--workdir={classifier}", "--seeds=2"), "holds a run of one seed")


def test_a_seed_that_is_too_large_is_refused_before_the_first_is_trained(call, tmp_path):
    command = ["train.py", "--config=glue", f"--workdir={tmp_path / 'new'}", f"--config.train.seed={2**31 - 1}"]
    refused(call(*command, "--seeds=2"), "--seeds=2 from train.seed 2147483647 on goes past 2**31 - 1")
    assert not (tmp_path / "new").exists()


def test_seeds_take_no_url(call):
    refused(call("train.py", "--config=glue", "--workdir=memory://runs/a", "--seeds=2"), "is a URL")


@pytest.mark.parametrize(("more", "rows"), [([], 2), thorough(["--adaptive_tolerance=0.5", "--early_exit=0.5"], 4)])
def test_a_classifier_is_loaded_and_compared(call, classifier, tmp_path, more, rows):
    model, config, tokenizer = odelm.load(classifier)
    assert isinstance(model, odelm.Classifier) and model.config.outputs == 2 and config.data.task == "rte"
    assert model(np.zeros((3, 5), np.int32), steps=2).shape == (3, 2)
    arguments = [f"--workdir={classifier}", f"--out={tmp_path}", "--repeats=2", "--dtype=float32", "--steps=4,2"]
    done = call("infer.py", *arguments, *more)
    assert done.returncode == 0, done.stderr
    report, logged = report_of(tmp_path), evaluated(classifier)
    assert report["text"]["task"] == "rte" and report["text"]["majority"] == {"accuracy": 0.6}
    by_steps = {row["steps"]: row for row in report["rows"] if row["early_exit"] is None}
    for steps in (4, 2):
        assert by_steps[steps]["metrics"] == logged["eval_metrics"][str(steps)]
        # Sums of ten float32 terms in batches of other sizes.
        assert by_steps[steps]["loss"] == pytest.approx(logged["eval_loss"][str(steps)], rel=1e-6)
    assert len(report["rows"]) == rows and all(0 <= row["metrics"]["accuracy"] <= 1 for row in report["rows"])
    assert "accuracy" in done.stdout and "10 examples of rte, whose most frequent class scores" in done.stdout


def test_python_in_the_document_runs(classifier, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sst2").symlink_to(classifier)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python", ROOT / "docs" / "fine-tuning.md")
    scope: dict = {}
    exec(block, scope)
    assert scope["logits"].shape == (2, 2) and scope["logits"].dtype == np.float32


def test_what_a_classifier_cannot_do_is_refused(call, classifier, corpus, tmp_path):
    refused(call("infer.py", f"--workdir={classifier}", "--prompt=a"), "this model is an encoder")
    refused(call("infer.py", f"--workdir={classifier}", "--max_loss_increase=1%"), "Classifier has no language model")
    refused(call("infer.py", f"--workdir={classifier}", f"--baseline={classifier}"), "Classifier has no language model")
    done = call(
        "infer.py", f"--workdir={classifier}", f"--text={corpus}", f"--out={tmp_path}", "--repeats=1", "--steps=2"
    )
    assert done.returncode == 0 and "no losses: a classifier is measured on the examples" in done.stderr


def test_a_classifier_is_exported(call, classifier, tmp_path):
    done = call("infer.py", f"--workdir={classifier}", f"--export={tmp_path / 'bundle'}", "--steps=2")
    assert done.returncode == 0, done.stderr
    model, config, _ = odelm.load(tmp_path / "bundle")
    (batch,) = read_task_data(config, tokenizer_file=tmp_path / "bundle" / "tokenizer.json").held_out().batches(10)
    inputs = [batch[name] for name in ("tokens", "mask", "token_types")]
    forward = jax.export.deserialize((tmp_path / "bundle" / "forward_2_steps.jaxexport").read_bytes())
    logits = forward.call(*inputs)
    assert logits.shape == (10, 2)
    # Another program for the same float32 sums.
    np.testing.assert_allclose(logits, model(*inputs[:1], mask=inputs[1], token_types=inputs[2], steps=2), atol=1e-5)
    about = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["artifacts"]["forward_2_steps.jaxexport"]
    assert (
        about["arguments"][2] == "token_types int32 (batch, length)" and about["result"] == "logits float32 (batch, 2)"
    )
    done = call("interop", "export", f"--workdir={classifier}", f"--to={tmp_path / 'folder'}")
    assert done.returncode == 0 and "ForSequenceClassification" in done.stdout, done.stderr
    again, _, _ = odelm.load(tmp_path / "folder")
    # The block's time is folded into the weights of separate layers.
    full = model(inputs[0], mask=inputs[1], token_types=inputs[2])
    np.testing.assert_allclose(again(inputs[0], mask=inputs[1], token_types=inputs[2]), full, atol=1e-4)


MISTAKES = {
    "task": (["--config.data.task=sst"], ["data.task is 'sst'", "did you mean 'sst2'"]),
    "folder": (["--config.data.source=/absent"], ["data.source is /absent", "not a folder"]),
    "file": (["--config.data.task=cola"], ["nor a folder for cola", "rte"]),
    "length": (["--config.train.length=4"], ["a row of 4 tokens has no room", "train.length"]),
    "positions": (["--config.train.length=99"], ["train.length is 99", "32"]),
}


@pytest.mark.parametrize(("wrong", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_one_line(call, options, tmp_path, wrong, words):
    refused(call("train.py", "--config=glue", f"--workdir={tmp_path / 'run'}", *options, *wrong), *words)
    assert not (tmp_path / "run").exists()


def test_a_decoder_is_refused(call, options, decoder, tmp_path):
    other = f"--config.init.from_pretrained={decoder}"
    refused(call("train.py", "--config=glue", f"--workdir={tmp_path / 'run'}", *options, other), "is a decoder")
    assert not (tmp_path / "run").exists()

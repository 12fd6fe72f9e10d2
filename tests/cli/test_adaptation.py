"""An existing model, measured, adapted, interrupted, resumed, compared and written, through the command line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import interop
from odelm.programs.interop import main as interop_main
from tests.cli.conftest import trained
from tests.cli.test_programs import PNG, refused, report_of

BERT = odelm.ModelConfig(
    kind="encoder", vocab_size=300, width=32, heads=2, depth=4, groups=4, max_length=32, norm="layernorm",
    norm_placement="post", embed_norm=True, positions="learned", qk_norm=False, bias=True, token_types=2,
    time_modulation=False,
)  # fmt: skip
SHAPE = ["--length=16", "--repeats=2", "--eval_batches=2"]


@pytest.fixture(scope="session")
def folder(small, once) -> Path:
    """Returns a Hugging Face folder made of a run of a small ALBERT with unit steps."""

    def export(base: Path) -> None:
        options = ["--config.model.embed_dim=16", "--config.step_sampling.kind=fixed"]
        trained(base / "run", "encoder_small", *small, *options)
        assert interop_main(["export", f"--workdir={base / 'run'}", f"--to={base / 'albert'}"]) == 0

    return once("adapt", export) / "albert"


@pytest.fixture(scope="module")
def options(small) -> list[str]:
    """Returns the small options without those of the model, which is the folder's."""
    kept = [option for option in small if ".model." not in option and "counts" not in option]
    # Two executables an adaptation, and two to evaluate: each takes seconds to compile.
    return [*kept, "--config.step_sampling.counts=4,2", "--config.train.eval_steps=2"]


def losses_of(workdir) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}


@pytest.mark.thorough
def test_a_folder_is_compared_at_every_step_count(folder, corpus, call, tmp_path):
    done = call("infer.py", f"--model={folder}", "--steps=4,2,1", f"--text={corpus}", f"--out={tmp_path}", *SHAPE)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["steps"] for row in report["rows"]] == [4, 2, 1]
    assert all(row["loss"] > 0 for row in report["rows"]) and "loss_before" not in report["rows"][0]
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)
    assert not (folder / "infer").exists()


@pytest.mark.thorough
def test_without_text_a_folder_is_timed_alone(folder, call, tmp_path):
    done = call("infer.py", f"--workdir={folder}", "--steps=4", f"--out={tmp_path}", *SHAPE)
    assert done.returncode == 0 and "give --text=FILE" in done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["loss"] is None


def test_a_folder_is_adapted_resumed_and_compared_with_what_it_was(folder, options, call, tmp_path):
    command = ["train.py", "--config=configs/adapt.py", f"--workdir={tmp_path}", *options]
    command += [f"--config.init.from_pretrained={folder}", "--config.train.seed=7"]
    first = call(*command, "--config.train.updates=3")
    assert first.returncode == 0, first.stderr
    assert f"starts from {folder}" in first.stdout
    assert re.search(r"2 steps: held-out loss before \d\.\d+, after \d\.\d+", first.stdout)
    before = losses_of(tmp_path)[0]
    resumed = call(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after update 3" in resumed.stdout
    assert losses_of(tmp_path)[0] == before and set(losses_of(tmp_path)) == {0, 3, 6}
    model, config, tokenizer = odelm.load(tmp_path)
    assert config.init.from_pretrained == str(folder) and model.config.time_modulation
    assert tokenizer.to_str() == odelm.load(folder)[2].to_str()

    done = call("infer.py", f"--workdir={tmp_path}", "--steps=4,2", *SHAPE)
    assert done.returncode == 0, done.stderr
    rows = report_of(tmp_path / "infer")["rows"]
    assert all(row["loss_before"] > 0 and row["loss_before"] != row["loss"] for row in rows)
    assert "before" in done.stdout


@pytest.mark.thorough
def test_a_folder_and_a_run_are_measured_on_the_same_rows_of_a_text(folder, options, corpus, call, tmp_path):
    run, own = tmp_path / "run", [f"--config.init.from_pretrained={folder}", "--config.train.seed=7"]
    own += ["--config.data.mask_unit=span", "--config.data.mask_rate=0.3", "--config.data.packing=documents"]
    done = call("train.py", "--config=configs/adapt.py", f"--workdir={run}", *options, *own, "--config.train.updates=1")
    assert done.returncode == 0, done.stderr
    text = ["--steps=4,2", f"--text={corpus}", *SHAPE]
    for source in (f"--model={folder}", f"--workdir={run}"):
        done = call("infer.py", source, f"--out={tmp_path / source[2:7]}", *text)
        assert done.returncode == 0, done.stderr
    alone, adapted = (json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("model", "workd"))
    for row, past in zip(alone, adapted, strict=True):
        assert past["loss_before"] == pytest.approx(row["loss"], abs=1e-6)


def test_a_stack_that_takes_no_fewer_steps_is_told_to_be_shared(small, options, call, tmp_path):
    folder = tmp_path / "bert"
    interop.export(odelm.create(BERT, rngs=nnx.Rngs(0)), folder)
    done = call("infer.py", f"--model={folder}", "--steps=2", *SHAPE)
    refused(done, "steps is 2", "init.groups")
    options = [option for option in options if "steps=" not in option and "counts" not in option]
    source = f"--config.init.from_pretrained={folder}"
    refused(
        call("train.py", "--config=configs/adapt.py", f"--workdir={tmp_path / 'run'}", *options, source), "init.groups"
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.thorough
def test_the_folder_may_go_once_the_run_has_a_checkpoint(folder, options, call, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    command = ["train.py", "--config=configs/adapt.py", f"--workdir={tmp_path / 'run'}", *options]
    command.append(f"--config.init.from_pretrained={source}")
    assert call(*command, "--config.train.updates=3").returncode == 0
    shutil.rmtree(source)
    done = call(*command)
    assert done.returncode == 0 and "resumed after update 3" in done.stdout, done.stderr
    done = call("infer.py", f"--workdir={tmp_path / 'run'}", "--steps=4", *SHAPE)
    assert done.returncode == 0 and "no losses of the model before adaptation" in done.stderr
    assert "loss_before" not in report_of(tmp_path / "run" / "infer")["rows"][0]


@pytest.mark.thorough
def test_an_ordinary_stack_is_shared_and_adapted(small, options, call, tmp_path):
    unshared = ["--config.model.depth=2", "--config.model.groups=2", "--config.step_sampling.counts=2"]
    done = call("train.py", "--config=configs/decoder_unshared.py", f"--workdir={tmp_path / 'run'}", *small, *unshared)
    assert done.returncode == 0, done.stderr
    assert interop_main(["export", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'gpt2'}"]) == 0
    source = [f"--config.init.from_pretrained={tmp_path / 'gpt2'}", "--config.init.groups=1"]
    source += ["--config.step_sampling.counts=2,1", "--config.train.eval_steps=1"]
    merge = ["--config.init.merge=low_rank", "--config.init.rank=2"]
    done = call("train.py", "--config=configs/adapt.py", f"--workdir={tmp_path / 'shared'}", *options, *source, *merge)
    assert done.returncode == 0, done.stderr
    assert "shared 2 blocks as 1: each is the mean of 2 layers, and a residual of rank 2" in " ".join(
        done.stdout.split()
    )
    assert set(losses_of(tmp_path / "shared")) == {0, 6}
    assert set(losses_of(tmp_path / "shared")[0]) == {"2", "1"}
    done = call("infer.py", f"--workdir={tmp_path / 'shared'}", "--steps=2,1", *SHAPE)
    assert done.returncode == 0, done.stderr
    full, coarse = report_of(tmp_path / "shared" / "infer")["rows"]
    assert full["loss_before"] > 0 and coarse["loss_before"] is None
    done = call("infer.py", f"--model={tmp_path / 'gpt2'}", "--prompt=word1 and", "--new_tokens=4", "--steps=2")
    assert done.returncode == 0 and done.stdout.startswith("word1 and")


def test_adaptation_refuses_another_source_and_a_folder_without_a_tokenizer(folder, options, call, tmp_path):
    command = ["train.py", "--config=configs/adapt.py", f"--workdir={tmp_path / 'run'}", *options]
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    refused(call(*command, f"--config.init.from_pretrained={bare}"), "no tokenizer.json", "data.tokenizer")
    assert not (tmp_path / "run").exists()
    assert call(*command, f"--config.init.from_pretrained={folder}", "--config.train.updates=1").returncode == 0
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    refused(call(*command, f"--config.init.from_pretrained={moved}"), "init.from_pretrained", "--workdir")
    refused(call(*command, "--config.init.from_pretrained=/absent"), "/absent")
    refused(call("infer.py", f"--model={bare}", f"--text={folder}", "--length=16"), "no tokenizer.json")
    refused(call("infer.py", f"--model={bare}", f"--workdir={bare}"), "one of --workdir and --model")
    refused(call("infer.py"), "one of --workdir and --model")
    refused(call("infer.py", f"--model={folder}", "--text=/absent", "--length=16"), "/absent")
    assert np.isfinite(list(losses_of(tmp_path / "run")[0].values())).all()

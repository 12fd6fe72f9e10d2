"""`infer.py --export`, what it prints, and every mode of `infer.py` on the bundle that it wrote."""

import json
import shutil

import jax
import numpy as np
import pytest

import odelm
from odelm import bundle, interop
from odelm import profile as profiles
from tests.calls import compiled
from tests.thorough import few
from tests.unit.interop.conftest import GPT2

LOSSES = ("--steps=4,2", "--repeats=1", "--dtype=float32")


def losses(folder) -> list[float]:
    return [row["loss"] for row in json.loads((folder / "report.json").read_text())["rows"]]


@pytest.fixture(scope="module")
def bundled(decoder, once):
    """Returns a bundle of the finished run, which no test may change."""

    def write(folder):
        from odelm.programs.infer import main

        assert main([f"--workdir={decoder}", f"--export={folder / 'b'}", "--steps=4,2"]) == 0

    return once("bundled", write) / "b"


def test_export_writes_a_bundle_and_says_what_is_in_it(call, decoder, tmp_path):
    done = call("infer.py", f"--workdir={decoder}", f"--export={tmp_path / 'b'}")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == f"wrote {tmp_path / 'b'}"
    printed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in lines}
    assert printed == {path.name: path.stat().st_size for path in (tmp_path / "b").iterdir()}
    forwards = [name for name in printed if name.endswith(".jaxexport")]
    assert forwards == [f"forward_{steps}_steps.jaxexport" for steps in (1, 2, 4)], "the default counts"
    assert any("2 evaluations of the blocks, float32, for cpu, cuda, tpu" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert bundle.read_about(tmp_path / "b")["step"] == 6
    assert (tmp_path / "b" / "tokenizer.json").read_text() == (decoder / "tokenizer.json").read_text()


def test_a_bundle_in_8_bits_without_forward_passes(call, decoder, tmp_path):
    done = call("infer.py", f"--workdir={decoder}", f"--export={tmp_path / 'b'}", "--steps=none", "--storage=int8")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6, "a line for each of five files"
    assert odelm.load(tmp_path / "b")[1] == odelm.load(decoder)[1]
    done = call("infer.py", f"--workdir={decoder}", "--storage=int8")
    assert done.returncode == 2 and "--storage is of --export, which was not given" in done.stderr


@pytest.mark.thorough
def test_a_model_that_comes_with_odelm_is_found_by_its_name(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("infer.py", "--model=small-decoder", "--prompt=The history of", "--steps=1,5", "--new_tokens=4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The history of ") == 2 and done.stdout.startswith("The history of ")
    assert "---" not in done.stdout and "--- 1 steps\n" in done.stderr and "--- 5 steps\n" in done.stderr
    done = call("infer.py", "--model=small-decoder", "--steps=1", "--length=16", "--repeats=1", "--eval_batches=1")
    assert done.returncode == 0 and "written to runs/shipped/small-decoder/infer" in done.stdout, done.stderr
    report = json.loads((tmp_path / "runs/shipped/small-decoder/infer/report.json").read_text())
    assert report["text"]["documents"] == 8 and [row["steps"] for row in report["rows"]] == [10, 1]
    done = call("infer.py", "--model=small")
    assert done.returncode == 2 and "come with odelm, small-decoder, small-encoder" in done.stderr


@pytest.mark.parametrize("kind", few(["decoder", "encoder"], "decoder"))
def test_the_artifacts_compute_what_the_run_does(kind, request, call, tmp_path):
    workdir = request.getfixturevalue(kind)
    done = call("infer.py", f"--model={workdir}", f"--export={tmp_path / 'b'}", "--steps=2")
    assert done.returncode == 0, done.stderr
    model, config, _ = odelm.load(workdir)
    again, config_again, _ = odelm.load(tmp_path / "b")
    assert config_again == config
    forward = jax.export.deserialize((tmp_path / "b" / "forward_2_steps.jaxexport").read_bytes())
    tokens = np.arange(36, dtype=np.int32).reshape(4, 9)
    mask = None if kind == "decoder" else np.arange(9)[None] < np.array([[9], [5], [1], [8]])
    expected = compiled(model)(tokens, mask=mask, steps=2)
    np.testing.assert_array_equal(compiled(again)(tokens, mask=mask, steps=2), expected)
    # The same float32 sums, in another order.
    given = [tokens] if mask is None else [tokens, mask]
    np.testing.assert_allclose(forward.call(*given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("flag", ["--workdir", "--model"])
def test_a_bundle_is_compared_as_its_run_is(flag, call, decoder, bundled, tmp_path):
    copy = shutil.copytree(bundled, tmp_path / "b")
    for source, out in ((decoder, [f"--out={tmp_path / 'run'}"]), (copy, [])):
        done = call("infer.py", f"{flag}={source}", *LOSSES, *out)
        assert done.returncode == 0, done.stderr
    assert losses(copy / "infer") == losses(tmp_path / "run") and None not in losses(copy / "infer")
    report = json.loads((copy / "infer" / "report.json").read_text())
    assert report["model"]["trained_updates"] == 6 and all(row["trained"] for row in report["rows"])
    odelm.load(copy)  # the report beside its files does not disturb it


def test_a_bundle_without_its_runs_text_is_timed(call, bundled, tmp_path):
    copy = shutil.copytree(bundled, tmp_path / "b")
    model, config, tokenizer = odelm.load(copy)
    config = odelm.config.serialize.replace(config, {"data.source": "/elsewhere/texts"})
    bundle.write(tmp_path / "c", model, config, tokenizer=tokenizer, step=6)
    done = call("infer.py", f"--model={tmp_path / 'c'}", *LOSSES)
    assert done.returncode == 0 and "no losses: the run's text cannot be read" in done.stderr


def test_a_bundle_continues_a_prompt_as_its_run_does(call, decoder, bundled):
    options = ["--prompt=word1 and", "--steps=2", "--new_tokens=8"]
    texts = [call("infer.py", f"--workdir={source}", *options).stdout for source in (decoder, bundled)]
    assert texts[0] == texts[1] and texts[0].startswith("word1 and")


def test_a_bundle_of_a_bundle_is_the_same(call, bundled, tmp_path):
    copy = shutil.copytree(bundled, tmp_path / "b")
    model = odelm.load(copy)[0]
    profile = profiles.Profile((0.0, 4.0), "euler", 1, 0.01, 0.0, 0.005, "text", 9, 2, profiles.fingerprint_of(model))
    profiles.write(profile, copy / "profile.json")
    before = (copy / "profile.json").read_bytes()
    done = call("infer.py", f"--model={copy}", f"--export={tmp_path / 'c'}", "--steps=4,2", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert "4 evaluations of the blocks, bfloat16" in done.stdout
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "c" / name).read_bytes() == (bundled / name).read_bytes()
    assert (tmp_path / "c" / "profile.json").read_bytes() == before
    about = bundle.read_about(tmp_path / "c")
    assert about["step"] == 6 and about["profile"]


def test_a_hugging_face_folder_is_bundled_and_a_bundle_written_as_one(call, make_model, tmp_path):
    model = make_model(**GPT2)
    interop.export(model, tmp_path / "gpt2")
    done = call("infer.py", f"--model={tmp_path / 'gpt2'}", f"--export={tmp_path / 'b'}")
    assert done.returncode == 0, done.stderr
    assert bundle.read_about(tmp_path / "b")["step"] is None
    done = call("infer.py", f"--model={tmp_path / 'b'}", "--repeats=1", "--length=8")
    assert done.returncode == 0 and "no losses: give --text=FILE" in done.stderr
    done = call("interop", "export", f"--workdir={tmp_path / 'b'}", f"--to={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    tensors = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("gpt2", "again")]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt=word1"], "--export and --prompt were given, which do not go together"),
        (["--adaptive_tolerance=0.1"], "--export and --adaptive_tolerance were given"),
        (["--text=missing"], "--export and --text were given"),
        (["--tensor=2"], "--export and --tensor were given"),
        (
            ["--solver=kvaerno3", "--integrator=diffrax"],
            "solver 'kvaerno3' with integrator 'diffrax' cannot be exported",
        ),
        (["--solver=hein"], "did you mean 'heun'"),
        (["--steps=0"], "steps is 0"),
        (["--dtype=int4"], "model.dtype is 'int4'"),
    ],
)
def test_mistakes_leave_nothing(options, words, call, decoder, tmp_path):
    done = call("infer.py", f"--workdir={decoder}", f"--export={tmp_path / 'b'}", *options)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert words in done.stderr and not list(tmp_path.iterdir())


def test_what_is_there_is_refused_before_anything_is_loaded(call, decoder, bundled, monkeypatch):
    monkeypatch.setattr("odelm.pretrained.load", lambda *a, **k: pytest.fail("the model was loaded"))
    before = {path.name: path.read_bytes() for path in bundled.iterdir()}
    for target in (bundled, decoder):
        done = call("infer.py", f"--workdir={decoder}", f"--export={target}")
        assert done.returncode == 2 and f"{target} exists already; give a new directory" in done.stderr
    assert {path.name: path.read_bytes() for path in bundled.iterdir()} == before


def test_a_damaged_bundle_is_one_line(call, bundled, tmp_path):
    copy = shutil.copytree(bundled, tmp_path / "b")
    (copy / "model.safetensors").unlink()
    for options in (["--prompt=word1"], [], [f"--export={tmp_path / 'c'}"]):
        done = call("infer.py", f"--model={copy}", *options)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert "model.safetensors is missing" in done.stderr
    assert not (tmp_path / "c").exists()

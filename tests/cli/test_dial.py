"""The quality dial through the command line: searched, saved, used, and every mistake told in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest

import odelm
from odelm.evals import search
from odelm.evals.candidates import full_depth
from odelm.profile import PROFILE
from tests.cli.test_programs import PNG, refused


@pytest.fixture
def run(decoder, tmp_path) -> Path:
    """Returns a run that may be changed."""
    return shutil.copytree(decoder, tmp_path / "run")


@pytest.fixture
def tuned(decoder, once, call) -> Path:
    """Returns a run with a profile, which no test may change."""

    def fill(folder: Path) -> None:
        shutil.copytree(decoder, folder, dirs_exist_ok=True)
        done = call("infer.py", f"--workdir={folder}", "--max_loss_increase=20%", "--repeats=1", "--eval_batches=4")
        assert done.returncode == 0, done.stderr
        (folder / "printed.txt").write_text(done.stdout)

    return once("tuned", fill)


def test_a_run_gets_a_profile_and_a_report(tuned):
    profile = json.loads((tuned / PROFILE).read_text())
    report = json.loads((tuned / "infer" / "dial.json").read_text())
    full, *rows = report["rows"]
    (chosen,) = [row for row in rows if row["chosen"]]
    assert (full["steps"], full["evaluations"], full["chosen"], full["loss_increase"]) == (4, 4, False, 0.0)
    assert [row["evaluations"] for row in rows] == [3, 2, 1]
    assert profile["evaluations"] == chosen["evaluations"] and profile["solver"] == chosen["solver"]
    assert len(profile["grid"]) == chosen["steps"] + 1 and chosen["grid"] in (None, profile["grid"])
    assert profile["loss_increase"] == pytest.approx(chosen["loss_increase"], rel=1e-6, abs=1e-9)
    assert profile["loss_increase_bound"] == chosen["loss_increase_bound"] <= 0.2 == profile["max_loss_increase"]
    assert profile["tokens"] == report["text"]["tokens"]
    assert report["dial"]["searched"]["tokens"] == pytest.approx(report["text"]["tokens"], rel=0.2)
    assert (tuned / "infer" / "dial.png").read_bytes().startswith(PNG)
    printed = (tuned / "printed.txt").read_text()
    assert f"written to {tuned / PROFILE}" in printed and f"> {chosen['steps']}" in printed
    assert "at 95 % confidence by at most" in printed and "of the 20 % allowed" in printed
    assert not (tuned / "infer" / "report.json").exists()


def test_the_profile_is_loaded_with_the_run_and_used(tuned, call, tmp_path):
    profile = odelm.load(tuned)[0].profile
    assert profile is not None and profile == odelm.profile.read(tuned / PROFILE)
    prompt = ["--prompt=word1 and", "--temperature=0", "--new_tokens=5"]
    own = call("infer.py", f"--workdir={tuned}", *prompt)
    given = call("infer.py", f"--workdir={tuned}", *prompt, "--steps=2")
    every = call("infer.py", f"--workdir={tuned}", *prompt, "--solver=heun")
    assert own.stdout.startswith("word1 and") and own.stdout.count("word1 and") == 1, own.stderr
    assert given.stdout.count("word1 and") == 1 and every.stdout.count("word1 and") == 3

    compared = call("infer.py", f"--workdir={tuned}", f"--out={tmp_path}", "--repeats=1", "--eval_batches=1")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["steps"] for row in rows if row["chosen"]] == [len(profile.grid) - 1], compared.stderr
    call("infer.py", f"--workdir={tuned}", f"--out={tmp_path}", "--repeats=1", "--eval_batches=1", "--steps=2")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert not any(row["chosen"] for row in rows) and len(rows) == 2


@pytest.mark.thorough
def test_a_profile_with_unequal_steps_is_a_row_of_its_own(tuned, call, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    profile = json.loads((run / PROFILE).read_text()) | {"grid": [0, 3, 4], "solver": "heun", "evaluations": 4}
    del profile["checksum"]
    (run / PROFILE).write_text(json.dumps(profile))
    done = call("infer.py", f"--workdir={run}", "--repeats=1", "--eval_batches=1")
    *others, own = json.loads((run / "infer" / "report.json").read_text())["rows"]
    assert len(others) == 3 and not any(row["chosen"] or row["grid"] for row in others)
    assert (own["steps"], own["grid"], own["solver"], own["evaluations"]) == (2, [0, 3, 4], "heun", 4)
    assert own["chosen"] and not own["trained"]
    assert "0 3 4" in done.stdout and "> 2 *" in done.stdout and "profile.json" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max_loss_increase=abc"], ["abc", "0.5%"]),
        (["--max_loss_increase="], ["--max_loss_increase", "0.5%"]),
        (["--max_loss_increase=nan"], ["nan", "0.005"]),
        (["--max_loss_increase=-1%"], ["-1%", "from 0"]),
        (["--max_loss_increase=5"], ["'5'", "below 1"]),
        (["--max_loss_increase=1%", "--steps=2"], ["leave out --steps"]),
        (["--max_loss_increase=1%", "--solver=heun"], ["leave out --solver"]),
        (["--max_loss_increase=1%", "--prompt=a"], ["leave out --prompt"]),
        (["--max_loss_increase=1%", "--eval_batches=0"], ["leave out --eval_batches=0"]),
        (["--max_loss_increase=1%", "--length=999"], ["999", "32"]),
        (["--max_loss_increase=1%", "--text=/nowhere.txt"], ["/nowhere.txt"]),
    ],
)  # fmt: skip
def test_what_is_refused_writes_nothing(options, words, call, run):
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    refused(call("infer.py", f"--workdir={run}", "--repeats=1", *options), *words)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_an_unreachable_tolerance_says_what_it_would_take(call, run, monkeypatch):
    measure = search.losses_of

    def worse(runner, settings, half):
        """Adds a fifth to what all but full depth lose."""
        full = full_depth(runner.model.config)
        return {s: nats if s == full else 1.2 * nats for s, nats in measure(runner, settings, half).items()}

    monkeypatch.setattr(search, "losses_of", worse)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    command = [f"--workdir={run}", "--repeats=1", "--eval_batches=4"]
    done = call("infer.py", *command, "--max_loss_increase=0.1%")
    refused(done, "unreachable", "fewer than 4 evaluations", "smallest increase found", "within 0.1 %", "more text")
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
    (allowed,) = re.findall(r"allow (--max_loss_increase=\S+%)", done.stderr)
    assert call("infer.py", *command, allowed).returncode == 0
    assert (run / PROFILE).exists()


def test_a_profile_of_other_parameters_is_refused_and_made_again(tuned, call, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "6")
    refused(call("infer.py", f"--workdir={run}", "--prompt=a"), str(run / PROFILE), "of another model", "make it again")
    with pytest.raises(odelm.InputError, match="another model"):
        odelm.load(run)
    # Whoever says how many steps there are needs no profile.
    assert call("infer.py", f"--workdir={run}", "--prompt=a", "--steps=2", "--new_tokens=2").returncode == 0
    again = ["--max_loss_increase=20%", "--repeats=1", "--eval_batches=4"]
    assert call("infer.py", f"--workdir={run}", *again).returncode == 0
    assert odelm.load(run)[0].profile is not None
    (run / PROFILE).write_text("{")
    refused(call("infer.py", f"--workdir={run}", "--prompt=a"), str(run / PROFILE), "damaged", "remove the file")


def test_a_profile_is_written_to_out(call, decoder, tmp_path):
    before = sorted(decoder.rglob("*"))
    options = ["--max_loss_increase=0.2", "--repeats=1", "--eval_batches=4", f"--out={tmp_path / 'new' / 'out'}"]
    done = call("infer.py", f"--workdir={decoder}", *options)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {PROFILE, "dial.json", "dial.png"}
    assert sorted(decoder.rglob("*")) == before
    path = tmp_path / "new" / "out" / PROFILE
    assert f"infer.py --profile_file={path}" in done.stdout
    prompt = [f"--workdir={decoder}", "--prompt=word1 and", "--temperature=0", "--new_tokens=5"]
    own = call("infer.py", *prompt, f"--profile_file={path}")
    assert own.stdout.count("word1 and") == 1 and own.returncode == 0, own.stderr
    assert odelm.load(decoder, profile=path)[0].profile == odelm.profile.read(path)
    refused(
        call("infer.py", *prompt, f"--profile_file={path}", "--steps=2"), "--profile_file and --steps", "leave out one"
    )
    refused(call("infer.py", *prompt, f"--profile_file={tmp_path}"), f"{tmp_path} is no file, expected a profile")


def test_a_bundle_has_the_profiles_own_forward_pass_and_takes_another_profile(tuned, call, run):
    path = run / PROFILE
    values = json.loads((tuned / PROFILE).read_text()) | {"grid": [0, 3, 4], "solver": "heun", "evaluations": 4}
    del values["checksum"]
    path.write_text(json.dumps(values))
    done = call("infer.py", f"--workdir={run}", f"--export={run / 'b'}")
    assert done.returncode == 0, done.stderr
    artifacts = json.loads((run / "b" / "bundle.json").read_text())["artifacts"]
    (own,) = [one for one in artifacts.values() if one["grid"]]
    assert own["grid"] == [0, 3, 4] and own["solver"] == "heun" and len(artifacts) == 4
    assert odelm.load(run / "b")[0].profile == odelm.profile.read(path)
    done = call("infer.py", f"--model={run / 'b'}", "--max_loss_increase=20%", "--repeats=1", "--eval_batches=4")
    assert done.returncode == 0, done.stderr
    profile = odelm.load(run / "b")[0].profile
    assert profile is not None and profile.grid != (0.0, 3.0, 4.0)

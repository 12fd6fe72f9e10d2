"""`infer.py --early_exit`: what it measures, writes and generates, and every mistake told in one line."""

import pytest

from tests.cli.test_programs import PNG, refused, report_of
from tests.thorough import few

SMALL = ["--length=16", "--repeats=2", "--eval_batches=1"]


@pytest.mark.parametrize("kind", few(["decoder", "encoder"], "encoder"))
def test_rows_that_leave_early_are_compared_with_full_depth(kind, request, call, tmp_path):
    workdir = request.getfixturevalue(kind)
    arguments = [f"--workdir={workdir}", f"--out={tmp_path}", "--steps=2", "--batch=4", *SMALL]
    done = call("infer.py", *arguments, "--early_exit=1e-9,1e9")
    assert done.returncode == 0, done.stderr
    full, coarse, none, all_of_them = report_of(tmp_path)["rows"]
    assert [row["early_exit"] for row in (full, coarse, none, all_of_them)] == [None, None, 1e-9, 1e9]
    assert none["evaluations"] == full["evaluations"] == 4 and all_of_them["evaluations"] == 3
    assert none["loss"] == pytest.approx(full["loss"], rel=1e-5) and not none["trained"]
    assert all_of_them["loss"] not in (full["loss"], coarse["loss"])
    assert (tmp_path / "report.png").read_bytes().startswith(PNG) and "4, exit 1e+09" in done.stdout


@pytest.mark.thorough
def test_texts_whose_tokens_leave_early_are_compared_and_continued(decoder, call, tmp_path):
    arguments = [f"--workdir={decoder}", "--new_tokens=6", "--exit_measure=prediction"]
    measured = [f"--out={tmp_path}", "--generate", "--steps=2", *SMALL]
    done = call("infer.py", *arguments, *measured, "--early_exit=1e-9,1")
    assert done.returncode == 0, done.stderr
    full, coarse, none, all_of_them = report_of(tmp_path, "generation.json")["rows"]
    assert [row["label"] for row in (full, coarse, none, all_of_them)] == ["4", "2", "4, exit 1e-09", "4, exit 1"]
    assert none["text_evaluations"] == none["evaluations"] == full["evaluations"] == 4
    assert none["identical"] == 1 and none["loss"] == pytest.approx(full["loss"], rel=1e-5)
    assert all_of_them["text_evaluations"] == all_of_them["evaluations"] == 3
    assert "evals" in done.stdout and "exits, by the prediction" not in done.stdout
    prompt = ["--prompt=word1 and", "--temperature=0", "--steps=4"]
    plain, same = call("infer.py", *arguments[:2], *prompt), call("infer.py", *arguments, *prompt, "--early_exit=1e-9")
    assert same.returncode == 0, same.stderr
    assert same.stdout == plain.stdout and same.stdout.startswith("word1 and")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--early_exit=much"], "expected tolerances such as 0.1,0.2"),
        (["--early_exit=0"], "expected a number above 0"),
        (["--exit_measure=prediction"], "--early_exit, which was not given"),
        (["--prompt=a", "--exit_measure=prediction"], "--early_exit, which was not given"),
        (["--prompt=a", "--early_exit="], "expected tolerances such as 0.1,0.2"),
        (["--max_loss_increase=1%", "--kv_span=2"], "leave out --kv_span"),
        (["--generate", "--quantize=int8", "--kv_span=2"], "--quantize takes no --kv_span"),
        (["--early_exit=0.1", "--solver=heun"], "Euler"),
        (["--early_exit=0.1", "--generate", "--prefill_steps=4"], "takes no --prefill_steps"),
        (["--early_exit=0.1", "--prompt=a", "--speculative"], "takes no --speculative"),
        (["--early_exit=0.1,0.2", "--prompt=a"], "has 2 tolerances"),
        (["--early_exit=0.1", "--quantize=int8"], "--quantize takes --early_exit only"),
        (["--early_exit=0.1", "--max_loss_increase=1%"], "leave out --early_exit"),
        (["--early_exit=0.1", "--export=new"], "--export and --early_exit"),
        (["--early_exit=0.1", "--baseline=other"], "--early_exit and --baseline"),
    ],
)
def test_mistakes_are_told(decoder, call, flags, words):
    refused(call("infer.py", f"--workdir={decoder}", *flags), words)

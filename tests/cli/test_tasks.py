"""`python -m odelm.evals`: what it scores, prints and writes, and every mistake told in one line."""

import json
import math
from pathlib import Path

import pytest

from odelm.evals.tasks import evaluate
from odelm.programs import evals, harness
from tests.cli.test_programs import PNG, refused

KEYS = {"task", "metric", "steps", "evaluations", "value", "stderr", "n", "random", "majority"}
QUESTION = {"query": "word1 and word3", "choices": ["and word7", "word2", "zz"], "label": 0}
PAIR = {"sentence_good": "word1 and word3", "sentence_bad": "word1 word1 and"}
QUICK = ["--repeats=2", "--length=16", "--batch_size=4"]


def lines(path: Path, *records: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Returns a folder with a few items of named tasks, and files of one's own."""
    folder = tmp_path_factory.mktemp("tasks")
    lines(folder / "lambada/lambada_test.jsonl", *[{"text": f"word{i} and word{i + 3} and"} for i in range(3)])
    for name in ("island", "gap"):
        lines(folder / f"blimp/{name}.jsonl", PAIR, PAIR | {"sentence_good": "and word3 and"}, PAIR)
    lines(folder / "own.jsonl", QUESTION, QUESTION | {"label": 2}, QUESTION)
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2/wiki.test.tokens").write_text(" \n = A = \n \n word1 and word4 \n \n = B = \n \n word2 and \n")
    return folder


def rows_of(folder: Path) -> dict[tuple[str, str, int], dict]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert all(set(row) == KEYS for row in rows)
    return {(row["task"], row["metric"], row["steps"]): row for row in rows}


def test_a_decoder_is_scored_at_each_step_count(call, decoder, data, tmp_path):
    tasks = f"--tasks=lambada,blimp,wikitext2,{data / 'own.jsonl'}"
    arguments = [f"--model={decoder}", f"--data={data}", f"--out={tmp_path}", "--steps=2,4", *QUICK]
    done = call("evals", *arguments, tasks)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    metrics = [
        ("lambada", "acc"), ("lambada", "perplexity"), ("blimp/gap", "acc"), ("blimp/island", "acc"), ("blimp", "acc"),
        ("wikitext2", "word_perplexity"), ("own", "acc"), ("own", "acc_norm"),
    ]  # fmt: skip
    assert set(rows) == {(*metric, steps) for metric in metrics for steps in (4, 2)}
    own, words = rows["own", "acc", 4], rows["lambada", "perplexity", 2]
    assert (own["n"], own["random"], own["majority"]) == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (own["evaluations"], rows["own", "acc", 2]["evaluations"]) == (4, 2)
    # Trained for six updates on 300 tokens: hardly better than a uniform guess.
    assert 1 < words["value"] < 2 * words["random"] and words["stderr"] > 0
    assert rows["blimp", "acc", 4]["n"] == 6 and rows["blimp", "acc", 4]["majority"] is None
    assert words["value"] != rows["lambada", "perplexity", 4]["value"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [latency["steps"] for latency in results["latencies"]] == [4, 2]
    assert results["model"]["source"] == str(decoder) and results["tasks"]["own"] == str(data / "own.jsonl")
    assert (tmp_path / "results.png").read_bytes().startswith(PNG)
    for word in (
        "4 steps",
        "2 steps",
        "random",
        "majority",
        "blimp/island",
        "±",
        "ms a batch",
        f"written to {tmp_path}",
    ):
        assert word in done.stdout, word
    assert "lambada: 3 texts, each in 4, 2 steps" in done.stderr
    before = (tmp_path / "results.json").read_bytes()
    refused(call("evals", *arguments, tasks), "results.json is there already", "--overwrite")
    assert (tmp_path / "results.json").read_bytes() == before


def test_a_place_that_cannot_hold_results_is_refused_before_anything_is_scored(call, decoder, data, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        message = f"the report cannot be written to {out}, because {tmp_path / 'file'} is a file; give --out"
        own = f"--tasks={data / 'own.jsonl'}"
        for done in (
            call("evals", f"--model={decoder}", f"--out={out}", own, *QUICK),
            call("infer.py", f"--workdir={decoder}", f"--out={out}", "--repeats=1"),
        ):
            refused(done, message)
            assert not done.stdout


def test_an_encoder_is_scored_on_pairs_of_sentences(call, encoder, data, tmp_path):
    arguments = [f"--model={encoder}", f"--data={data}", f"--out={tmp_path}", "--steps=4,2", *QUICK]
    done = call("evals", *arguments, "--tasks=blimp", "--limit=2")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert set(rows) == {(name, "acc", steps) for name in ("blimp", "blimp/gap", "blimp/island") for steps in (4, 2)}
    for steps in (4, 2):
        mean = (rows["blimp/gap", "acc", steps]["value"] + rows["blimp/island", "acc", steps]["value"]) / 2
        assert math.isclose(rows["blimp", "acc", steps]["value"], mean)
    other = call("evals", *arguments, "--tasks=blimp,lambada", "--overwrite")
    refused(other, "lambada is scored by the likelihood of what follows a text", "this model is an encoder")


def test_lm_eval_that_is_missing_is_told_in_one_line(call, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    refused(call("harness", "--model=odelm"), "lm-eval, which is not installed: pip install 'odelm[harness]'")


def test_without_steps_and_out_the_usual_ones_are_taken(decoder, monkeypatch):
    evals.command_line.parse(evals.FLAGS, [f"--model={decoder}", "--tasks=lambada"])
    assert evals._steps() is None and evals._out() == decoder / "evals"


MISTAKES = {
    "no model": (["--tasks=own.jsonl"], ["--model is missing"]),
    "no tasks": (["--model=RUN"], ["--tasks is missing"]),
    "task": (["--model=RUN", "--tasks=hellaswga"], ["'hellaswga' is neither", "did you mean 'hellaswag'"]),
    "no data": (["--model=RUN", "--tasks=piqa"], ["has no file of the task piqa", "--data"]),
    "steps that are words": (["--model=RUN", "--tasks=own.jsonl", "--steps=a"], ["--steps is 'a'", "12,6,3"]),
    "steps above depth": (["--model=RUN", "--tasks=own.jsonl", "--steps=0"], ["steps", "0"]),
    "length": (["--model=RUN", "--tasks=own.jsonl", "--length=99"], ["--length is 99", "try --length=32"]),
    "no run": (["--model=nowhere", "--tasks=own.jsonl"], ["nowhere"]),
    "line": (["--model=RUN", "--tasks=bad.jsonl"], ["bad.jsonl, line 2 has the label 9, expected 0 to 2"]),
    "flag": (["--model=RUN", "--task=own.jsonl"], ["task"]),
}


@pytest.mark.parametrize("arguments, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_one_line(call, decoder, data, tmp_path, monkeypatch, arguments, words):
    lines(data / "bad.jsonl", QUESTION, QUESTION | {"label": 9})
    monkeypatch.setattr(evaluate, "evaluate", None)
    given = [argument.replace("RUN", str(decoder)) for argument in arguments]
    refused(call("evals", *given, f"--data={data}", f"--out={tmp_path / 'out'}"), *words)
    assert not (tmp_path / "out").exists()


def test_a_text_that_the_model_cannot_take_is_told_with_its_file(call, encoder, data, tmp_path):
    lines(tmp_path / "long.jsonl", PAIR | {"sentence_bad": "word1 " * 40})
    done = call("evals", f"--model={encoder}", f"--tasks={tmp_path / 'long.jsonl'}", f"--out={tmp_path}", *QUICK)
    refused(done, "long.jsonl: the text", "past the model's 32 positions")

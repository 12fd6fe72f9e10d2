"""lm-eval's own tasks scored by its model of transformers, by ours in it, and by this library, which agree."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import odelm
from odelm.errors import InputError
from odelm.evals import harness
from odelm.evals.likelihood import Scorer
from odelm.evals.tasks.evaluate import evaluate
from odelm.evals.tasks.find import find_tasks
from tests.harness.conftest import RUN, Theirs, evaluated, lines, needed

Instance = needed("lm_eval.api.instance").Instance
HFLM = needed("lm_eval.models.huggingface").HFLM

OWN = Path(__file__).parent / "tasks" / "questions.yaml"
LONG = "word2 and word9 and word16 and word23 and word30 and word37 and " * 3
HELLASWAG = {"activity_label": "Roof", "ctx_a": "word1 and word4.", "ctx_b": "and word7",
             "endings": ["word10", "[substeps] and word1 and  that.", "is word2 [title] and", "zz"]}  # fmt: skip
TASKS = {
    "lambada": ("lambada/lambada_openai.yaml", "test", [
        {"text": "word1 and word4 and"}, {"text": LONG + "word44"}, {"text": '"No.\n\nword3 and word6'}]),
    "blimp": ("blimp/_template_yaml", "validation", [
        {"sentence_good": good, "sentence_bad": bad} for good, bad in
        [("word1 and word4", "word4 word4 and"), ("Cats are.", "Cats is."), ("and", "and and"), ("word7", "word7")]]),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", [HELLASWAG | {"label": str(i)} for i in (0, 1, 3)]
        + [HELLASWAG | {"ctx_a": LONG, "label": "2"}]),
    "piqa": ("piqa/piqa.yaml", "validation", [
        {"goal": "word5 and", "sol1": "word8 and word11", "sol2": "stop", "label": i} for i in (0, 1, 0)]),
    "arc_easy": ("arc/arc_easy.yaml", "test", [
        {"question": "Which?", "choices": {"text": ["word3", "and", "a b c"], "label": ["A", "B", "C"]},
         "answerKey": key} for key in "CAB"]),
    "wikitext": ("wikitext/wikitext.yaml", "test", [
        {"page": f" = One = \n \n {LONG}, ( word1 ) word2 @-@ word3 . \n"}, {"page": " = Two = \n \n word4 's \n"}]),
}  # fmt: skip
# float32 logits of two libraries differ by 1e-6 of their size, a few units; sums are of up to a hundred tokens.
CLOSE = dict(rel=1e-4)


@dataclass(frozen=True)
class Ours:
    """What this library finds for a model on the tasks of a file."""

    metrics: dict[str, tuple[float, float]]
    """With their standard errors."""
    asked: list[tuple[str, str]]
    logs: list[float]

    @classmethod
    def of(cls, model: Path, file: Path, steps: int) -> "Ours":
        loaded, _, tokenizer = odelm.load(model)
        scorer = Scorer(loaded, tokenizer, steps=(steps,), batch_size=2)
        tasks = find_tasks([str(file)], file.parent)
        asked = [pair for task in tasks for item in task.items for pair in item.pairs]
        metrics = {row["metric"]: (row["value"], row["stderr"]) for row in evaluate(scorer, tasks)}
        return cls(metrics, asked, [one.log for one in scorer(asked)[steps]])


def check(theirs: Theirs, ours: Ours) -> None:
    assert [texts if len(texts) == 2 else ("", *texts) for texts in theirs.asked] == ours.asked
    assert theirs.logs == pytest.approx(ours.logs, **CLOSE)
    check_metrics(theirs.metrics, ours)


def check_metrics(theirs: dict[str, float], ours: Ours) -> None:
    assert len(ours.metrics) > 0
    for metric, (value, stderr) in ours.metrics.items():
        assert theirs[f"{metric},none"] == pytest.approx(value, **CLOSE), metric
        if metric.startswith("acc"):
            assert theirs[f"{metric}_stderr,none"] == pytest.approx(stderr, **CLOSE), metric


@pytest.mark.parametrize("name", TASKS)
def test_three_ways_give_the_same_numbers(name, exported, published, tmp_path):
    task, split, records = TASKS[name]
    file = lines(tmp_path / f"{name}.jsonl", records)
    local = published(task, file, split)
    ours = Ours.of(exported, file, 4)
    check(evaluated(HFLM(pretrained=str(exported), dtype="float32", device="cpu", batch_size=2), local), ours)
    check(evaluated(harness.HarnessModel(str(exported), batch_size=2), local), ours)


def test_steps_are_those_that_are_asked_for(published, tmp_path):
    task, split, records = TASKS["lambada"]
    file = lines(tmp_path / "lambada.jsonl", records)
    local = published(task, file, split)
    found = {steps: Ours.of(RUN, file, steps) for steps in (4, 2)}
    assert found[4].logs != pytest.approx(found[2].logs, rel=1e-2), "steps must matter for this to test anything"
    check(evaluated(harness.HarnessModel(str(RUN), steps=2), local), found[2])
    check(evaluated(harness.HarnessModel(str(RUN)), local), found[4])


COMMANDS = {
    "lm_eval": [str(Path(sys.executable).parent / "lm_eval")],
    "odelm": [sys.executable, "-m", "odelm.evals.harness"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_command_of_lm_eval_knows_the_model(command, tmp_path):
    """As in docs/tasks.md, without a network, with the task that is shipped beside this test."""
    command = [*command, "--model", "odelm", "--model_args", f"path={RUN},steps=2", "--tasks", str(OWN),
               "--batch_size", "4", "--output_path", str(tmp_path / "out")]  # fmt: skip
    offline = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=OWN.parent, env=os.environ | offline
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|questions|" in done.stdout
    (written,) = (tmp_path / "out").rglob("results*.json")
    check_metrics(json.loads(written.read_text())["results"]["questions"], Ours.of(RUN, OWN.with_suffix(".jsonl"), 2))


def generation(*requests: tuple[str, dict]) -> list[Any]:
    return [Instance("generate_until", {}, arguments, i) for i, arguments in enumerate(requests)]


def test_text_is_generated_as_transformers_generates_it(exported):
    asked = generation(
        ("word1 and", {"until": ["\n\n"], "max_gen_toks": 8}),
        (LONG, {"until": ["\n\n"], "max_gen_toks": 8}),
        ("word40", {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}),
        ("word3", {"until": "\n\n", "max_gen_toks": 4}),
    )
    ours = harness.HarnessModel(str(exported), batch_size=2).generate_until(asked)
    theirs = HFLM(pretrained=str(exported), dtype="float32", device="cpu", batch_size=1).generate_until(asked)
    assert ours == theirs and len(set(ours)) == len(asked), (ours, theirs)


def test_generation_ends_before_what_it_is_told_to_stop_at(exported):
    model = harness.HarnessModel(str(exported))
    (whole,) = model.generate_until(generation(("word1 and", {"max_gen_toks": 12})))
    stop = whole[3]
    (cut,) = model.generate_until(generation(("word1 and", {"max_gen_toks": 12, "until": [stop]})))
    assert cut == whole[: whole.index(stop)]


def test_options_that_it_cannot_follow_are_refused(exported):
    model = harness.HarnessModel(str(exported))
    with pytest.raises(InputError, match="generates with num_beams=4; .*choices: do_sample"):
        model.generate_until(generation(("a", {"num_beams": 4})))
    with pytest.raises(InputError, match="generates 256 tokens, past the model's 32 positions"):
        model.generate_until(generation(("a", {})))
    encoder = harness.HarnessModel(str(RUN.with_name("encoder_0_1")))
    with pytest.raises(InputError, match="text is generated by decoders"):
        encoder.generate_until(generation(("a", {"max_gen_toks": 1})))


def test_an_encoder_compares_sentences_by_pseudo_likelihood(published, tmp_path):
    task, split, records = TASKS["blimp"]
    file = lines(tmp_path / "pairs.jsonl", records)
    run = RUN.with_name("encoder_0_1")
    check(evaluated(harness.HarnessModel(str(run), steps=2), published(task, file, split)), Ours.of(run, file, 2))


def test_a_text_of_many_windows_has_the_likelihood_of_lm_eval(exported):
    request = [Instance("loglikelihood_rolling", {}, (LONG,), 0)]
    (ours,) = harness.HarnessModel(str(exported)).loglikelihood_rolling(request)
    (theirs,) = HFLM(pretrained=str(exported), dtype="float32", device="cpu").loglikelihood_rolling(request)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)

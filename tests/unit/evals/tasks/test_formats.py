"""Records in the published formats become the questions that lm-eval asks; others are refused."""

import pytest

from odelm.errors import InputError
from odelm.evals.tasks.formats import format_of
from odelm.evals.tasks.items import Passage, Question, SentencePair

HELLASWAG = {
    "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man sits on a roof.", "ctx_b": "he",
    "ctx": "A man sits on a roof. he", "split": "val", "split_type": "indomain", "label": 3, "source_id": "activitynet",
    "endings": ["wraps skis.", "[substeps] is  ripping tiles.", "holds a cube [title] Next.", " pulls roofing."],
}  # fmt: skip
ARC = {"id": "x", "question": {"stem": "Which is hot?", "choices": [
    {"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]}, "answerKey": "B"}  # fmt: skip
CASES = {
    "own question": (
        {"query": "Two and two are", "choices": ["three", "four", "five"], "label": 1, "more": 0},
        Question("Two and two are", ("three", "four", "five"), 1),
    ),
    "own passage": ({"text": "the end is near"}, Passage("the end is", " near")),
    "a passage of two lines": ({"text": 'He said.\n\n"Show me signs'}, Passage('He said.\n\n"Show me', " signs")),
    "hellaswag": (
        HELLASWAG,
        Question(
            "Roof shingle removal: A man sits on a roof. He",
            ("wraps skis.", " is ripping tiles.", "holds a cube.  Next.".replace("  ", " "), "pulls roofing."), 3,
        ),
    ),
    "hellaswag with a query": (
        {"ind": 0, "query": "Roof: A man. he", "label": "1", "endings": ["sits.", "stands."]},
        Question("Roof: A man. he", ("sits.", "stands."), 1),
    ),
    "piqa": (
        {"id": "x", "goal": "dresser", "sol1": "a pin ", "sol2": "woodgrain", "label": "0"},
        Question("Question: dresser\nAnswer:", ("a pin ", "woodgrain"), 0),
    ),
    "arc": (ARC, Question("Question: Which is hot?\nAnswer:", ("ice", "fire"), 1)),
    "arc of the hub": (
        {"id": "x", "question": "Which?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "1"},
        Question("Question: Which?\nAnswer:", ("ice", "fire"), 0),
    ),
    "blimp": (
        {"sentence_good": "Cats are.", "sentence_bad": "Cats is.", "UID": "x", "simple_LM_method": True},
        SentencePair("Cats are.", "Cats is."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("record, item", CASES.values(), ids=CASES)
def test_a_record_becomes_the_item_that_lm_eval_asks(record, item):
    assert format_of(record).read(record) == item


def test_the_texts_of_an_item_are_what_is_scored():
    assert CASES["arc"][1].pairs == (
        ("Question: Which is hot?\nAnswer:", " ice"),
        ("Question: Which is hot?\nAnswer:", " fire"),
    )
    assert CASES["blimp"][1].pairs == (("", " Cats are."), ("", " Cats is."))
    assert CASES["own passage"][1].pairs == (("the end is", " near"),)


OWN = CASES["own question"][0]
WRONG = {
    "no format": ({"prompt": "a"}, "has the fields prompt, which is no format of a task; expected those of BLiMP:"),
    "not an object": ([1], "has no fields, which is no format"),
    "label past the choices": (OWN | {"label": 3}, "has the label 3, expected 0 to 2"),
    "negative label": (OWN | {"label": -1}, "has the label -1, expected 0 to 2"),
    "label that is a word": (OWN | {"label": "four"}, "has the label 'four', expected the index"),
    "label that is a truth value": (OWN | {"label": True}, "has the label True, expected the index"),
    "empty choice": (OWN | {"choices": ["a", " "]}, "expected two or more, none of them empty"),
    "one choice": (OWN | {"choices": ["a"], "label": 0}, "expected two or more"),
    "choices that are a text": (OWN | {"choices": "a"}, 'has no list of texts "choices"'),
    "a query that is a number": (OWN | {"query": 1}, 'has no text "query": it is int'),
    "half of a character": ({"text": "a \ud800 b"}, '"text" is not UTF-8'),
    "half of a character in a choice": (OWN | {"choices": ["a", "\ud800"]}, '"choices" is not UTF-8'),
    "one word": ({"text": "word"}, "without a last word after a space"),
    "a space at the end": ({"text": "a word "}, "without a last word after a space"),
    "empty sentence": ({"sentence_good": "", "sentence_bad": "a"}, 'has an empty "sentence_good"'),
    "answer that is no choice": (ARC | {"answerKey": "C"}, "has the answer 'C', expected one of A, B"),
    "arc without choices": ({"question": "Which?", "answerKey": "A"}, 'has no choices with "text" and "label"'),
    "piqa without a label": ({"goal": "a", "sol1": "b", "sol2": "c"}, "has the label None"),
}


@pytest.mark.parametrize("record, message", WRONG.values(), ids=WRONG)
def test_a_record_that_is_wrong_is_refused(record, message):
    with pytest.raises(InputError) as error:
        format_of(record).read(record)
    assert message in str(error.value)

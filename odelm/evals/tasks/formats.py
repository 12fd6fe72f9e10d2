"""The published formats of tasks: which one a record is in, and the item that it becomes.

Prompts are those of lm-eval's tasks of these names (version 0.4.13), so that scores can be compared.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from odelm.errors import InputError
from odelm.evals.tasks.items import Item, Page, Passage, Question, SentencePair
from odelm.evals.tasks.wikitext import page_of
from odelm.files import whole_characters

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """How the records of a kind of file are read. `read` raises InputError for a record that is not in the format."""

    name: str
    fields: tuple[str, ...]
    """A record that has all of these is in this format."""
    read: Callable[[Record], Item]


def own_question(record: Record) -> Question:
    """Returns the question of `{"query", "choices", "label"}`, the label being the index of the right choice."""
    return question(text_of(record, "query"), texts_of(record, "choices"), label_of(record))


def hellaswag(record: Record) -> Question:
    """Returns HellaSwag's question (Zellers et al. 2019, arXiv 1905.07830): as published, `{"activity_label", "ctx_a",
    "ctx_b", "endings", "label"}`, or with one `query` in place of the first three."""
    if "ctx_a" in record:
        after = f"{text_of(record, 'ctx_a')} {text_of(record, 'ctx_b').capitalize()}"
        query = f"{text_of(record, 'activity_label')}: {after}"
    else:
        query = text_of(record, "query")
    endings = tuple(without_brackets(ending) for ending in texts_of(record, "endings"))
    return question(without_brackets(query), endings, label_of(record))


def without_brackets(text: str) -> str:
    """Returns a text of HellaSwag without the marks that WikiHow's pages left in it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def piqa(record: Record) -> Question:
    """Returns PIQA's question (Bisk et al. 2020, arXiv 1911.11641): `{"goal", "sol1", "sol2", "label"}`."""
    choices = (text_of(record, "sol1"), text_of(record, "sol2"))
    return question(f"Question: {text_of(record, 'goal')}\nAnswer:", choices, label_of(record))


def arc(record: Record) -> Question:
    """Returns ARC's question (Clark et al. 2018, arXiv 1803.05457).

    The published form is `{"question": {"stem", "choices": [{"text", "label"}, ...]}, "answerKey"}`, and that of the
    Hugging Face hub is `{"question", "choices": {"text": [...], "label": [...]}, "answerKey"}`.
    """
    asked, listed = record["question"], record.get("choices")
    if isinstance(asked, Mapping):
        listed, asked = asked.get("choices"), text_of(asked, "stem")
    if isinstance(listed, Mapping):
        texts, labels = texts_of(listed, "text"), listed.get("label")
    elif isinstance(listed, list) and all(isinstance(choice, Mapping) for choice in listed):
        texts, labels = tuple(text_of(choice, "text") for choice in listed), [one.get("label") for one in listed]
    else:
        raise InputError('has no choices with "text" and "label"')
    return keyed(asked, texts, labels, record["answerKey"])


def keyed(asked: Any, choices: tuple[str, ...], labels: Any, key: Any) -> Question:
    """Returns the question whose right choice has the label `key`, as ARC's prompt asks it."""
    if not isinstance(asked, str):
        raise InputError(f"has a question that is {type(asked).__name__}, expected a text")
    if not isinstance(labels, list) or len(labels) != len(choices):
        raise InputError(f"has {len(choices)} choices, expected a label for each of them")
    if key not in labels:
        raise InputError(f"has the answer {key!r}, expected one of {', '.join(map(str, labels))}")
    return question(f"Question: {_whole('question', asked)}\nAnswer:", choices, labels.index(key))


def blimp(record: Record) -> SentencePair:
    """Returns BLiMP's pair (Warstadt et al. 2020, arXiv 1912.00582): `{"sentence_good", "sentence_bad"}`."""
    return SentencePair(filled(record, "sentence_good"), filled(record, "sentence_bad"))


def passage(record: Record) -> Passage:
    """Returns the passage of `{"text"}`, whose last word is predicted: what follows the last space.

    LAMBADA has this format (Paperno et al. 2016, arXiv 1606.06031, in the version of Radford et al. 2019).
    """
    context, space, word = text_of(record, "text").rpartition(" ")
    if not space or not word.strip() or not context.strip():
        raise InputError("has a text without a last word after a space: there is nothing to predict")
    return Passage(context, space + word)


def page(record: Record) -> Page:
    """Returns the page of `{"page"}`, WikiText with a document a line (Merity et al. 2016, arXiv 1609.07843)."""
    return page_of(filled(record, "page"))


FORMATS = (
    Format("BLiMP", ("sentence_good", "sentence_bad"), blimp),
    Format("HellaSwag", ("endings",), hellaswag),
    Format("PIQA", ("goal", "sol1", "sol2"), piqa),
    Format("ARC", ("question", "answerKey"), arc),
    Format("multiple choice", ("query", "choices", "label"), own_question),
    Format("WikiText", ("page",), page),
    Format("cloze", ("text",), passage),
)
"""The formats of JSON lines, distinguished by the fields of a record; the first that fits is used."""


def format_of(record: Any) -> Format:
    """Returns the format that a record is in; raises InputError for one that is in none."""
    if isinstance(record, Mapping):
        for known in FORMATS:
            if all(field in record for field in known.fields):
                return known
    has = f"the fields {', '.join(record)}" if isinstance(record, Mapping) and record else "no fields"
    expected = "; ".join(f"{known.name}: {', '.join(known.fields)}" for known in FORMATS)
    raise InputError(f"has {has}, which is no format of a task; expected those of {expected}")


def question(context: str, choices: tuple[str, ...], label: int) -> Question:
    """Returns a question; raises InputError for one without two choices, with an empty one, or with a wrong label."""
    if len(choices) < 2 or not all(choice.strip() for choice in choices):
        raise InputError(f"has the choices {list(choices)!r:.80}, expected two or more, none of them empty")
    if not 0 <= label < len(choices):
        raise InputError(f"has the label {label}, expected 0 to {len(choices) - 1}, the index of a choice")
    return Question(context, choices, label)


def label_of(record: Record) -> int:
    """Returns the label of a record, a whole number or its digits; raises InputError for anything else."""
    label = record.get("label")
    if isinstance(label, str) and label.strip().isdecimal() and len(label) < 20:
        return int(label)
    if not isinstance(label, int) or isinstance(label, bool):
        raise InputError(f"has the label {label!r:.80}, expected the index of the right choice")
    return label


def text_of(record: Record, field: str) -> str:
    """Returns a field that is a text; raises InputError for one that is missing, or not a text."""
    value = record.get(field)
    if not isinstance(value, str):
        raise InputError(f'has no text "{field}": it is {type(value).__name__}')
    return _whole(field, value)


def filled(record: Record, field: str) -> str:
    """Returns a field that is a text and not empty; raises InputError for anything else."""
    text = text_of(record, field)
    if not text.strip():
        raise InputError(f'has an empty "{field}"')
    return text


def texts_of(record: Record, field: str) -> tuple[str, ...]:
    """Returns a field that is a list of texts; raises InputError for anything else."""
    value = record.get(field)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InputError(f'has no list of texts "{field}"')
    return tuple(_whole(field, one) for one in value)


def _whole(field: str, text: str) -> str:
    try:
        return whole_characters(f'"{field}"', text)
    except InputError as error:
        raise InputError(f"has a text that cannot be tokenised: {error}") from error

"""What tasks are made of: questions with choices, pairs of sentences, passages without their last word, and pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from odelm.evals.likelihood import Pair


class Item(Protocol):
    """One thing that a model is asked."""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The texts whose likelihoods answer it."""
        ...


@dataclass(frozen=True)
class Question:
    """A context and how it may continue, each choice joined to it by one space; the likeliest is the answer."""

    context: str
    choices: tuple[str, ...]
    label: int
    """The index of the right choice."""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return tuple((self.context, f" {choice}") for choice in self.choices)


@dataclass(frozen=True)
class SentencePair:
    """Two sentences of which only the first is acceptable: it should be the likelier one."""

    good: str
    bad: str

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return ("", f" {self.good}"), ("", f" {self.bad}")


@dataclass(frozen=True)
class Passage:
    """A text without its last word, and that word with the space before it."""

    context: str
    word: str

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return ((self.context, self.word),)


@dataclass(frozen=True)
class Page:
    """A document, every token of which is predicted."""

    text: str
    words: int
    """The number of words in the document as published, separated by spaces."""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return (("", self.text),)


@dataclass(frozen=True)
class Task:
    """A named set of items, all of one kind."""

    name: str
    items: Sequence[Item]
    source: str
    """The file that the items are from."""
    group: str | None = None
    """The name under which the mean over this task and others is reported."""

    @property
    def kind(self) -> type:
        return type(self.items[0])

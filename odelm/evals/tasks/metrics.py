"""Scores of a task with their standard errors, and what one would score without a model. Pure functions."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from odelm.evals.likelihood import Likelihood
from odelm.evals.tasks.items import Page, Passage, Question, SentencePair, Task
from odelm.models.loss import mean_loss_of_rows

LARGEST = 700.0
"""The logarithm above which a perplexity is no float64."""
Found = Sequence[Sequence[Likelihood]]
"""The likelihoods of each item's texts, in their order."""


@dataclass(frozen=True)
class Score:
    """One number of a task."""

    metric: str
    value: float
    stderr: float
    """The standard error of the value as an estimate for all items like these; nan for a single item."""
    n: int
    """How many items the value is computed from."""
    random: float | None
    """What a uniform guess scores: among the choices of a question, or among the tokens of the vocabulary."""
    majority: float | None
    """What the most frequent answer of the task scores if it is always given; None where that has no meaning."""


def scores_of(task: Task, found: Found, *, vocab_size: int) -> list[Score]:
    """Returns the scores of a task, given the likelihoods of its items' texts."""
    return _SCORES[task.kind](task.items, found, vocab_size)


def mean_of(scores: Sequence[Score]) -> Score:
    """Returns the mean of one metric over several tasks with equal weights; its error treats the tasks as a fixed set,
    as is intended for the mean over BLiMP's paradigms."""
    error = math.sqrt(sum(score.stderr**2 for score in scores)) / len(scores)
    known = [score.random for score in scores if score.random is not None]
    return Score(
        scores[0].metric,
        float(np.mean([score.value for score in scores])),
        error,
        sum(score.n for score in scores),
        float(np.mean(known)) if len(known) == len(scores) else None,
        None,
    )


def accuracy(metric: str, hits: Sequence[bool], random: float | None, majority: float | None) -> Score:
    """Returns the share of hits, with the standard error of a mean (of a sample, so divided by n - 1)."""
    values = np.asarray(hits, np.float64)
    return Score(metric, float(values.mean()), _stderr(values), len(values), random, majority)


def perplexity(metric: str, nats: np.ndarray, units: np.ndarray, *, uniform: float) -> Score:
    """Returns `exp(sum of nats / sum of units)` over items, float (n,) each, and `uniform` as the score of a uniform
    guess.

    Its standard error is that of the exponent, a ratio of means over items, times the perplexity: the delta method.
    lm-eval bootstraps it instead (for words it gives none).
    """
    mean = mean_loss_of_rows(nats, units)
    value = math.exp(min(mean.loss, LARGEST))
    return Score(metric, value, value * mean.stderr, len(nats), uniform, None)


def _questions(items: Sequence[Question], found: Found, vocab_size: int) -> list[Score]:
    labels = [item.label for item in items]
    logs = [np.array([one.log for one in likelihoods]) for likelihoods in found]
    # A choice's length in characters, without the space before it, as in lm-eval.
    lengths = [np.array([len(choice) for choice in item.choices], np.float64) for item in items]
    random = float(np.mean([1 / len(item.choices) for item in items]))
    majority = _majority(labels)
    plain = [int(log.argmax()) == label for log, label in zip(logs, labels, strict=True)]
    by_length = [int((log / n).argmax()) == label for log, n, label in zip(logs, lengths, labels, strict=True)]
    return [accuracy("acc", plain, random, majority), accuracy("acc_norm", by_length, random, majority)]


def _sentence_pairs(items: Sequence[SentencePair], found: Found, vocab_size: int) -> list[Score]:
    # As in lm-eval. BLiMP has a few pairs of equal sentences, whose likelihoods may differ by rounding.
    hits = [good.log >= bad.log or item.good == item.bad for item, (good, bad) in zip(items, found, strict=True)]
    return [accuracy("acc", hits, 0.5, None)]


def _passages(items: Sequence[Passage], found: Found, vocab_size: int) -> list[Score]:
    only = [one for (one,) in found]
    tokens = np.array([one.tokens for one in only], np.float64)
    nats = np.array([-one.log for one in only])
    chance = float(np.mean(float(vocab_size) ** -tokens))
    uniform = math.exp(min(float(tokens.mean()) * math.log(vocab_size), LARGEST))
    words = _majority([item.word for item in items])
    return [
        accuracy("acc", [one.greedy for one in only], chance, words),
        perplexity("perplexity", nats, np.ones(len(nats)), uniform=uniform),
    ]


def _pages(items: Sequence[Page], found: Found, vocab_size: int) -> list[Score]:
    only = [one for (one,) in found]
    words = np.array([item.words for item in items], np.float64)
    tokens = sum(one.tokens for one in only)
    uniform = math.exp(min(tokens / float(words.sum()) * math.log(vocab_size), LARGEST))
    return [perplexity("word_perplexity", np.array([-one.log for one in only]), words, uniform=uniform)]


_SCORES: dict[type, Callable[[Sequence, Found, int], list[Score]]] = {
    Question: _questions,
    SentencePair: _sentence_pairs,
    Passage: _passages,
    Page: _pages,
}


def _majority(answers: Sequence[object]) -> float:
    return Counter(answers).most_common(1)[0][1] / len(answers)


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan

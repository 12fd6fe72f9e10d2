"""Scores against numbers worked out by hand, and their errors against many samples drawn."""

import math

import numpy as np
import pytest

from odelm.evals.likelihood import Likelihood
from odelm.evals.tasks.items import Page, Passage, Question, SentencePair, Task
from odelm.evals.tasks.metrics import Score, mean_of, scores_of

VOCAB = 10


def like(log: float, *, greedy: bool = False, tokens: int = 1) -> Likelihood:
    return Likelihood(log, greedy, tokens)


def scores(items, found) -> dict[str, Score]:
    return {score.metric: score for score in scores_of(Task("t", items, "f"), found, vocab_size=VOCAB)}


def test_questions_are_scored_plainly_and_by_length_in_characters():
    questions = [Question("q", ("abcd", "é"), 0), Question("q", ("ab", "cd", "ef", "gh"), 3)]
    found = scores(questions, [[like(-3), like(-1)], [like(-3), like(-2), like(-1), like(-4)]])
    # The second choice of the first question is one character, though two bytes: -3/4 is above -1/1.
    assert (found["acc"].value, found["acc_norm"].value) == (0.0, 0.5)
    assert found["acc_norm"].stderr == pytest.approx(0.5) and found["acc"].n == 2
    assert found["acc"].random == pytest.approx((1 / 2 + 1 / 4) / 2) and found["acc"].majority == 0.5


def test_the_majority_is_the_most_frequent_label():
    questions = [Question("q", ("a", "b"), label) for label in (1, 1, 0, 1)]
    assert scores(questions, [[like(-1), like(-2)]] * 4)["acc"].majority == 0.75


def test_of_two_sentences_the_good_one_must_be_likelier():
    pairs = [SentencePair("a", "b")] * 4
    found = scores(pairs, [[like(-1), like(-2)], [like(-2), like(-1)], [like(-5), like(-2)], [like(0), like(-9)]])
    assert found["acc"].value == 0.5 and (found["acc"].random, found["acc"].majority) == (0.5, None)
    assert found["acc"].stderr == pytest.approx(math.sqrt(0.25 * 4 / 3 / 4))


def test_equal_sentences_and_equal_likelihoods_count_as_in_lm_eval():
    pairs = [SentencePair("a", "b"), SentencePair("a", "a"), SentencePair("a", "b")]
    found = scores(pairs, [[like(-1), like(-1)], [like(-1 - 1e-7), like(-1)], [like(-2), like(-1)]])
    assert found["acc"].value == pytest.approx(2 / 3)


def test_passages_have_an_accuracy_and_a_perplexity_of_the_word():
    passages = [Passage("a", " x"), Passage("b", " x"), Passage("c", " y")]
    found = scores(passages, [[like(-1, greedy=True)], [like(-2, tokens=2)], [like(-6)]])
    acc, perplexity = found["acc"], found["perplexity"]
    assert (acc.value, acc.n, acc.majority) == (pytest.approx(1 / 3), 3, pytest.approx(2 / 3))
    assert acc.random == pytest.approx((0.1 + 0.01 + 0.1) / 3)
    assert perplexity.value == pytest.approx(math.exp(3))
    assert perplexity.stderr == pytest.approx(math.exp(3) * np.std([1, 2, 6], ddof=1) / math.sqrt(3))
    assert (perplexity.random, perplexity.majority) == (pytest.approx(10 ** (4 / 3)), None)


def test_pages_have_one_perplexity_of_all_their_words():
    found = scores([Page("a", 4), Page("b", 12)], [[like(-20, tokens=5)], [like(-28, tokens=15)]])
    only = found["word_perplexity"]
    assert only.value == pytest.approx(math.exp(48 / 16)) and only.n == 2
    assert only.random == pytest.approx(10 ** (20 / 16)) and only.majority is None


def test_what_overflows_is_large_and_a_single_item_has_no_error():
    found = scores([Passage("a", " x")], [[like(-1e9)]])
    assert found["perplexity"].value == math.exp(700) and math.isnan(found["acc"].stderr)


def test_standard_errors_are_the_spread_over_samples():
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(400):
        words = rng.integers(50, 150, 40)
        nats = words * (2 + 0.3 * rng.standard_normal(40))
        draws.append(scores([Page("a", int(n)) for n in words], [[like(-float(x))] for x in nats])["word_perplexity"])
    spread = np.std([draw.value for draw in draws])
    # The spread of 400 samples is known to 1/sqrt(800), 3.5 %; three times that.
    assert np.mean([draw.stderr for draw in draws]) == pytest.approx(spread, rel=0.11)


def test_a_group_has_the_mean_of_its_tasks():
    first, second = Score("acc", 0.5, 0.03, 10, 0.5, None), Score("acc", 0.9, 0.04, 30, 0.5, None)
    assert mean_of([first, second]) == Score("acc", pytest.approx(0.7), pytest.approx(0.025), 40, 0.5, None)

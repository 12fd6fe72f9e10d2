"""Texts as rows of tokens and places: split as one text, cut to the model's positions, each token predicted once."""

from pathlib import Path

import pytest

from odelm import tokenizer as tokenizers
from odelm.errors import InputError
from odelm.evals.predictions import encode_pair, masked_in_turn, windows

TOKENIZER = Path(__file__).parents[2] / "fixtures" / "decoder_0_1" / "tokenizer.json"
START = 1


@pytest.fixture(scope="module")
def encode():
    tokenizer = tokenizers.load(TOKENIZER)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "context, continuation", [("word1 and", " word2"), ("word1 and ", "word2"), ("word1 and  ", "x")]
)
def test_a_pair_is_split_before_the_spaces_between(encode, context, continuation):
    before, after = encode_pair(encode, context, continuation, START)
    assert before == encode("word1 and")
    assert before + after == encode(context + continuation)
    assert after != encode(continuation) or context == "word1 and"


def test_a_pair_is_tokenised_as_one_text(encode):
    before, after = encode_pair(encode, "wor", "d1 and", START)
    assert before == encode("wor") and after == encode("word1 and")[len(before) :]
    assert after != encode("d1 and"), "the tokenizer must join the two for this to test anything"


def test_without_a_context_a_text_follows_the_end_of_another(encode):
    assert encode_pair(encode, "", " word1", START) == ([START], encode(" word1"))
    assert encode_pair(encode, "  ", "word1", START) == ([START], encode("  word1"))
    assert encode_pair(encode, "", "<|endoftext|>and", START) == ([START], encode("and"))
    with pytest.raises(InputError, match="the text '' has no tokens"):
        encode_pair(encode, "word1", "", START)


def test_a_long_context_is_cut_from_the_left():
    (only,) = windows(range(10), [10, 11], 4)
    assert (list(only.tokens), list(only.places), list(only.targets)) == ([7, 8, 9, 10], [2, 3], [10, 11])
    (whole,) = windows([5], [6, 7], 4)
    assert (list(whole.tokens), list(whole.places), list(whole.targets)) == ([5, 6], [0, 1], [6, 7])


def test_a_long_text_is_predicted_in_windows_as_lm_eval_predicts_it():
    """The example in the docstring of lm-eval's `LM.loglikelihood_rolling`."""
    found = [(list(row.tokens), [row.tokens[place] for place in row.places], list(row.targets))
             for row in windows([99], range(10), 4)]  # fmt: skip
    assert found == [
        ([99, 0, 1, 2], [99, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [7, 8], [8, 9]),
    ]


@pytest.mark.parametrize("context, length, limit", [(1, 16, 4), (3, 5, 4), (6, 4, 4), (1, 1, 4), (2, 9, 1)])
def test_each_token_of_a_text_is_predicted_once_by_the_one_before(context, length, limit):
    rows = windows(range(context), range(context, context + length), limit)
    assert [target for row in rows for target in row.targets] == list(range(context, context + length))
    for row in rows:
        assert len(row.tokens) <= limit
        assert [row.tokens[place] + 1 for place in row.places] == list(row.targets)


def test_each_token_that_is_not_special_is_masked_in_turn():
    rows = masked_in_turn([8, 3, 4, 9], [1, 0, 0, 1], 7)
    assert [(row.tokens, row.places, row.targets) for row in rows] == [
        ([8, 7, 4, 9], [1], [3]),
        ([8, 3, 7, 9], [2], [4]),
    ]

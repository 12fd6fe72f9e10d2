"""Sampling against the model called one token at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

import odelm
from odelm.infer.generate import continue_text, generate
from odelm.infer.runner import Runner
from tests.calls import compiled
from tests.fake_card import card, decode_on

PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def runner(make_config, randomise) -> Runner:
    """A model so far from its initialisation that it does not repeat one token."""
    model = odelm.create(make_config(dtype="float32", tie_readout=False), rngs=nnx.Rngs(0))
    return Runner.of(randomise(model, scale=1.0))


@pytest.fixture(scope="module")
def plan(runner):
    return runner.plan(2, "euler")


@pytest.fixture(scope="module")
def greedy(runner, plan) -> list[int]:
    return generate(runner, PROMPT, plan=plan, new_tokens=5, temperature=0)


def test_greedy_takes_the_most_likely_token_each_time(runner, greedy):
    text = list(PROMPT)
    for _ in range(5):
        logits = compiled(runner.model)(jnp.asarray([text]), steps=2)
        text.append(int(np.argmax(logits[0, -1])))
    assert greedy == text[len(PROMPT) :]
    assert len(set(greedy)) > 1, "the text must vary for this to test anything"


def test_text_stops_before_the_end_token(runner, plan, greedy):
    end = greedy[2]
    stopped = generate(runner, PROMPT, plan=plan, new_tokens=5, temperature=0, end=end)
    assert stopped == greedy[: greedy.index(end)]


def test_the_seed_decides_the_text(runner, plan):
    texts = [generate(runner, PROMPT, plan=plan, new_tokens=5, temperature=5.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_one_choice_is_greedy(runner, plan, greedy):
    assert generate(runner, PROMPT, plan=plan, new_tokens=5, temperature=5.0, top_k=1) == greedy
    of_all = [generate(runner, PROMPT, plan=plan, new_tokens=5, temperature=5.0, top_k=count) for count in (0, 10_000)]
    assert of_all[0] == of_all[1] != greedy


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "no tokens"),
        (PROMPT, {"new_tokens": 14}, "ask for 13 new tokens or fewer"),
        (PROMPT, {"new_tokens": 0}, "new_tokens is 0"),
        (PROMPT, {"new_tokens": 1, "temperature": -1.0}, "temperature is -1"),
        (PROMPT, {"new_tokens": 1, "temperature": float("nan")}, "temperature is nan"),
        (PROMPT, {"new_tokens": 1, "temperature": float("inf")}, "temperature is inf"),
        (PROMPT, {"new_tokens": 1, "top_k": -1}, "top_k is -1"),
        (PROMPT, {"new_tokens": 1, "seed": 10**26}, "seed is 1"),
        (PROMPT, {"new_tokens": 1, "seed": -1}, "seed is -1"),
        (PROMPT, {"new_tokens": 1, "temperature": "hot"}, "temperature is 'hot'"),
        (PROMPT, {"new_tokens": "8"}, "new_tokens is '8'"),
    ],
)
def test_mistakes_are_told(runner, plan, prompt, options, words):
    with pytest.raises(odelm.InputError, match=words):
        generate(runner, prompt, plan=plan, **options)


def test_an_encoder_does_not_generate(make_model):
    runner = Runner.of(make_model(kind="encoder"))
    with pytest.raises(odelm.InputError, match="encoder"):
        generate(runner, PROMPT, plan=runner.plan(2, "euler"), new_tokens=1)


@pytest.mark.parametrize("kernel", ["persistent", "launches", "xla"])
def test_a_continued_text_says_what_decoded_it_if_it_was_requested(make_model, monkeypatch, kernel):
    decode_on(card(monkeypatch), monkeypatch)
    runner, said = Runner.of(make_model(width=128, feedforward=128, dtype="bfloat16")), []
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcdefghijklm")}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    options = dict(plan=runner.plan(2, "euler"), new_tokens=2, top_k=0, kernel=kernel, say=said.append)
    assert continue_text(runner, words, "a b", **options).startswith("a b")
    assert said == [f"decoded by {kernel}"]

"""Texts continued with a memory have the probabilities of a pass over the whole text, for models, grids, methods and
prompts that are drawn, not listed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odelm import Generator
from tests.math.test_any_memory import SHAPES, calls, drawn

NEW = 4
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def check(make_model, options: dict, call: dict, lengths: list[int], seed: int) -> None:
    model = drawn(make_model, options)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 13, length).tolist() for length in lengths]
    found = Generator(model, **call)(prompts, new_tokens=NEW, temperature=2.0, seed=seed, logprobs=True)
    for prompt, one in zip(prompts, found, strict=True):
        logits = model(jnp.asarray([[*prompt, *one.tokens]]), **call)[0, len(prompt) - 1 : -1]
        expected = jax.nn.log_softmax(logits)[np.arange(NEW), jnp.asarray(one.tokens)]
        np.testing.assert_allclose(one.logprobs, expected, rtol=0, atol=2e-4)


@given(SHAPES, calls(), LENGTHS, st.integers(0, 99))
@settings(max_examples=2)
def test_a_few_models_continue_texts(make_model, options, call, lengths, seed):
    check(make_model, options, call, lengths, seed)


@pytest.mark.thorough
@given(SHAPES, calls(), LENGTHS, st.integers(0, 99))
@settings(max_examples=15)
def test_many_models_continue_texts(make_model, options, call, lengths, seed):
    check(make_model, options, call, lengths, seed)

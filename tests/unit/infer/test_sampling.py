"""What is drawn from logits, against its probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odelm.infer.sampling import COLDEST, Sampling, draw, log_chances, sampling_options

# Two rows of the same probabilities, none of them in order.
ORDERS = [3, 0, 4, 1, 2], [1, 4, 2, 0, 3]
LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))[np.array(ORDERS)]
RULES = {
    "all": (dict(), [0.4, 0.3, 0.15, 0.1, 0.05]),
    "top_k": (dict(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
    "top_p": (dict(top_p=0.6), [4 / 7, 3 / 7, 0, 0, 0]),
    "top_p, the first alone": (dict(top_p=0.1), [1, 0, 0, 0, 0]),
    "min_p": (dict(min_p=0.3), [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
    "temperature": (dict(temperature=0.5), [0.16, 0.09, 0.0225, 0.01, 0.0025]),
    "top_k and top_p": (dict(top_k=3, top_p=0.6), [4 / 7, 3 / 7, 0, 0, 0]),
    "top_p and min_p": (dict(top_p=0.8, min_p=0.5), [4 / 7, 3 / 7, 0, 0, 0]),
    "temperature before the others": (dict(temperature=0.5, top_p=0.6), [0.16, 0.09, 0, 0, 0]),
    "more than there are": (dict(top_k=9), [0.4, 0.3, 0.15, 0.1, 0.05]),
    "greedy": (dict(temperature=0.0), [1, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("rule, chances", RULES.values(), ids=RULES)
def test_tokens_are_drawn_with_their_probabilities(rule, chances):
    from scipy.stats import chisquare

    rows = 20_000
    sampling = Sampling(**(dict(temperature=1.0) | rule))
    exact = (np.array(chances) / np.sum(chances))[np.array(ORDERS)]
    np.testing.assert_allclose(jnp.exp(log_chances(jnp.asarray(LOGITS), sampling)), exact, atol=1e-6)
    found = np.asarray(draw(jnp.tile(jnp.asarray(LOGITS), (rows, 1)), sampling, jax.random.key(0)))
    for row, expected in enumerate(exact * rows):
        counts = np.bincount(found[row::2], minlength=5)
        assert not counts[expected == 0].any()
        if (expected > 0).sum() > 1:
            # One in a thousand right draws would fail, and the key is fixed.
            assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_program_that_knows_whether_it_is_greedy_has_no_branch_and_gives_the_same(temperature):
    logits, key = jnp.asarray(LOGITS), jax.random.key(0)
    known, found_out = sampling_options(temperature=temperature, top_k=3), Sampling(jnp.float32(temperature), top_k=3)
    for one in (lambda rule: draw(logits, rule, key), lambda rule: log_chances(logits, rule)):
        np.testing.assert_array_equal(one(known), one(found_out))
        branches = ["cond[" in str(jax.make_jaxpr(one)(rule)) for rule in (known, found_out)]
        assert branches == [False, True]


def test_what_stands_before_is_penalised():
    logits, seen = jnp.array([[2.0, 1.5, -1.0]]), jnp.array([[True, False, True]])
    assert draw(logits, Sampling(repetition_penalty=1.2), jax.random.key(0), seen).tolist() == [0]
    assert draw(logits, Sampling(repetition_penalty=1.5), jax.random.key(0), seen).tolist() == [1]
    assert log_chances(logits, Sampling(repetition_penalty=1.5), seen).argmax() == 1


@pytest.mark.parametrize("temperature", [1e-26, 1e-38, 1e-46])
def test_a_temperature_that_float32_cannot_divide_by_takes_the_most_likely_token(temperature):
    rule = sampling_options(temperature=temperature)
    assert draw(jnp.asarray(LOGITS), rule, jax.random.key(0)).tolist() == LOGITS.argmax(axis=1).tolist()
    coldest = sampling_options(temperature=COLDEST)
    chances = [np.exp(log_chances(jnp.asarray(LOGITS), one)) for one in (rule, coldest)]
    np.testing.assert_array_equal(*chances)


def test_more_choices_than_a_program_counts_are_all():
    rule = sampling_options(temperature=1.0, top_k=10**12)
    np.testing.assert_allclose(log_chances(jnp.asarray(LOGITS), rule), LOGITS, atol=1e-6)

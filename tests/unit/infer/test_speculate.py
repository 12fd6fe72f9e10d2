"""Drafts in coarse steps, verified at full depth: the text and the distribution are those of full depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

import odelm
from odelm.errors import InputError
from odelm.infer import speculate
from odelm.infer.drafts import Speculating
from odelm.infer.generator import Generator
from odelm.infer.sampling import Sampling
from tests.thorough import few

PROMPTS = [[3, 1, 4], [5], [9, 2, 6, 5, 3, 5]]


@pytest.fixture(scope="module")
def model(make_config, randomise):
    """Returns a model whose coarse steps agree with full depth at some places and at others not."""
    config = make_config(dtype="float32", tie_readout=False, max_length=32)
    return randomise(odelm.create(config, rngs=nnx.Rngs(0)), scale=0.6)


@pytest.fixture(scope="module")
def plain(model) -> Generator:
    return Generator(model)


@pytest.fixture(scope="module")
def drafting(model) -> Generator:
    return Generator(model, draft_steps=2, draft_length=3)


def test_texts_in_16_bits_part_only_where_rounding_decides(model):
    """Full depth's float32 logits of the two tokens differ by no more than two roundings of a logit to bfloat16."""
    plain, drafting = Generator(model, dtype="bfloat16"), Generator(model, dtype="bfloat16", draft_steps=2)
    prompts = [[(i * j) % 13 for j in range(1, 5)] for i in range(1, 25)]
    exact, found = (one(prompts, new_tokens=24) for one in (plain, drafting))
    same = 0
    for prompt, old, new in zip(prompts, exact, found, strict=True):
        parts = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        same += not parts
        if parts:
            logits = np.asarray(model(jnp.array([prompt + old[: parts[0]]]))[0, -1], np.float64)
            gap = abs(logits[old[parts[0]]] - logits[new[parts[0]]])
            assert gap <= 2 * 2.0**-8 * np.abs(logits).max(), (prompt, parts[0])
    assert same >= len(prompts) // 2 and drafting.draft_counts.accepted


POST = dict(norm_placement="post", groups=2, positions="learned")
MODELS = {
    "post, groups, learned": (POST, 0.1, dict(draft_steps=2)),
    "ends, an odd grid": (dict(depth=6, prelude=1, coda=1), 0.4, dict(draft_grid=[0, 0.7, 4])),
    "chain, heun verifies": (dict(inner_blocks=2), 0.1, dict(steps=2, solver="heun", draft_steps=1)),
    "lanes": (dict(lanes=2, wide_modulation=True), 0.1, dict(draft_steps=2)),
    "fewer key-value heads": (dict(heads=4, kv_heads=2, layer_rank=2), 0.2, dict(draft_steps=2)),
}


def agree(generator: Generator, exact: Generator, **options) -> None:
    for new, old in zip(
        generator(PROMPTS, logprobs=True, **options), exact(PROMPTS, logprobs=True, **options), strict=True
    ):
        assert new.tokens == old.tokens
        np.testing.assert_allclose(new.logprobs, old.logprobs, atol=1e-3)


@pytest.mark.parametrize("length, confidence", few([(3, 0.0), (1, 0.0), (5, 0.4)], (5, 0.4)))
def test_greedy_text_is_that_of_full_depth(model, plain, length, confidence):
    generator = Generator(model, draft_steps=2, draft_length=length, draft_confidence=confidence)
    agree(generator, plain, new_tokens=20)
    counts = generator.draft_counts
    assert 0 < counts.accepted < counts.drafted <= length * counts.rounds
    assert counts.tokens == 19 * len(PROMPTS) <= counts.rounds + counts.accepted
    assert (counts.drafted < length * counts.rounds) == (confidence > 0)


@pytest.mark.parametrize("options, scale, call", few(MODELS, "post, groups, learned"))
def test_every_kind_of_model_can_draft(options, scale, call, make_config, randomise):
    config = make_config(dtype="float32", tie_readout=False, max_length=32, **options)
    model = randomise(odelm.create(config, rngs=nnx.Rngs(0)), scale=scale)
    exact = {name: value for name, value in call.items() if not name.startswith("draft")}
    generator = Generator(model, **call)
    agree(generator, Generator(model, **exact), new_tokens=12)
    assert 0 < generator.draft_counts.accepted < generator.draft_counts.drafted


def test_the_last_position_is_used(model, plain, drafting):
    prompt = [[(7 * i) % 13 for i in range(12)]]
    assert drafting(prompt, new_tokens=20) == plain(prompt, new_tokens=20)
    with pytest.raises(InputError, match="ask for 20 new tokens or fewer"):
        drafting(prompt, new_tokens=21)


@pytest.fixture(scope="module")
def changeable(make_config, randomise) -> Generator:
    """Returns a generator whose texts change their tokens after a while, some of which are drafted."""
    config = make_config(dtype="float32", tie_readout=False, max_length=32, **POST)
    return Generator(randomise(odelm.create(config, rngs=nnx.Rngs(0)), scale=0.1), draft_steps=2)


def test_rows_end_with_their_end_token(changeable):
    plain, drafting = Generator.of(changeable.runner, None, changeable.plan), changeable
    whole = plain(PROMPTS, new_tokens=16)
    row, end = next((row, new) for row in whole for new in row if 3 <= row.index(new) < 12)
    generators = [Generator.of(one.runner, None, one.plan, drafting=one.drafting) for one in (plain, drafting)]
    for one in generators:
        one.end = end
    exact, found = (one(PROMPTS, new_tokens=16) for one in generators)
    counts = generators[1].draft_counts
    assert found == exact and len(found[whole.index(row)]) == row.index(end)
    assert counts.rounds and counts.accepted, "it ends among drafts"


def test_a_stop_string_ends_drafted_text_where_it_ends_the_other(changeable):
    words = {name: i for i, name in enumerate("abcdefghijklm")}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = Generator.of(changeable.runner, tokenizer, changeable.plan)
    drafting = Generator.of(changeable.runner, tokenizer, changeable.plan, drafting=changeable.drafting)
    whole = plain(["d b e", "f"], new_tokens=16)
    words = whole[0].split()
    # Two words, the first of which a stream must not show before it is sure that the second does not follow.
    pairs = [f"{one} {other}" for one, other in zip(words, words[1:], strict=False)]
    options = dict(new_tokens=16, stop=[next(pair for pair in pairs if pairs.index(pair) >= 3)])
    expected = plain(["d b e", "f"], **options)
    assert drafting(["d b e", "f"], **options) == expected != whole
    for generator, every in ((plain, 1), (drafting, 1), (drafting, 5)):
        pieces = [[one.text for one in found] for found in generator.stream(["d b e", "f"], every=every, **options)]
        assert pieces[-1] == expected
        for before, after in zip(pieces, pieces[1:], strict=False):
            assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


def test_what_stands_before_is_penalised(plain, drafting):
    agree(drafting, plain, new_tokens=12, repetition_penalty=1.3)


def test_a_stream_grows_to_the_whole(drafting):
    pieces = [[one.tokens for one in found] for found in drafting.stream(PROMPTS, new_tokens=16, every=5)]
    assert pieces[-1] == drafting(PROMPTS, new_tokens=16) and len(pieces) == 4
    for before, after in zip(pieces, pieces[1:], strict=False):
        assert all(new[: len(old)] == old for old, new in zip(before, after, strict=True))


def accept_all(draft, exact, key):
    return jnp.full(len(exact), draft.count)


def ignore_the_draft(draft, exact, accepted, key):
    return jax.random.categorical(key, exact[jnp.arange(len(accepted)), accepted]).astype(jnp.int32)


RULES = {"right": {}, "all are accepted": dict(_accepted=accept_all), "the rest is exact": dict(_rest=ignore_the_draft)}


@pytest.mark.parametrize("wrong", few(RULES, "right", "the rest is exact"))
def test_sampled_text_is_distributed_as_at_full_depth(wrong, model, monkeypatch):
    """Three tokens of many rows, against their exact probabilities; wrong rules are found out."""
    from scipy.stats import chisquare

    for name, rule in wrong.items():
        monkeypatch.setattr(speculate, name, rule)
    jax.clear_caches()
    rows, temperature, first = 20_000 if wrong else 3_000, 2.0, 7
    generator = Generator(model, draft_steps=1, draft_length=2, draft_confidence=0.3)
    # In pieces, so that rows which a draft has carried further wait for the others.
    options = dict(new_tokens=3, temperature=temperature, top_k=6, seed=5)
    *_, texts = generator.stream([[3, first]] * rows, every=1, **options)
    found = np.asarray([text.tokens for text in texts])
    exact = exact_chances(model, [3, first], temperature, top_k=6, tokens=3)
    counts = np.zeros_like(exact)
    np.add.at(counts, tuple(found.T), 1)
    assert not counts[exact == 0].any() or wrong
    likely = exact * rows > 5
    observed, expected = counts[likely], exact[likely] * rows
    test = chisquare([*observed, rows - observed.sum()], [*expected, rows - expected.sum()])
    jax.clear_caches()
    assert test.pvalue < 1e-6 if wrong else test.pvalue > 1e-3


@pytest.mark.thorough
def test_every_round_has_a_key_of_its_own_though_rows_have_ended(model):
    generator = Generator(model, draft_steps=1, draft_length=2)
    state = generator.begin([[3, 7]] * 2, 12, Sampling(jnp.float32(2.0)), jax.random.key(0))
    assert isinstance(state, Speculating)
    state = dataclasses.replace(state, done=state.done.at[0].set(True), rounds=state.rounds.at[0].set(50))
    keys = [jax.random.key_data(state.key).tolist()]
    for until in (3, 6, 9):
        state = generator._advance(state, Sampling(jnp.float32(2.0)), until)
        keys.append(jax.random.key_data(state.key).tolist())
    assert len(set(map(tuple, keys))) == 4


def exact_chances(model, prompt: list[int], temperature: float, *, top_k: int, tokens: int) -> np.ndarray:
    """Returns the probability of every continuation by so many tokens, (V,) * tokens, computed without a memory."""

    def after(texts: np.ndarray) -> np.ndarray:
        logits = np.asarray(model(jnp.asarray(texts))[:, -1], np.float64) / temperature
        least = np.sort(logits, axis=1)[:, -top_k, None]
        chances = np.where(logits >= least, np.exp(logits - logits.max(axis=1, keepdims=True)), 0)
        return chances / chances.sum(axis=1, keepdims=True)

    vocabulary = model.config.vocab_size
    chances, texts = np.ones(1), np.array([prompt])
    for _ in range(tokens):
        chances = (chances[:, None] * after(texts)).ravel()
        new = np.tile(np.arange(vocabulary), len(texts))[:, None]
        texts = np.concatenate([np.repeat(texts, vocabulary, axis=0), new], axis=1)
    return chances.reshape((vocabulary,) * tokens)


MISTAKES = [
    (dict(draft_steps=2, draft_length=0), "draft_length is 0"),
    (dict(draft_steps=2, draft_confidence=1.5), "draft_confidence is 1.5"),
    (dict(draft_steps=2, prefill_steps=4), "leave out prefill_steps"),
    (dict(draft_steps=2, draft_grid=[0, 4]), "give one"),
    (dict(draft_grid=[0, 3]), "where depth time ends"),
]


@pytest.mark.parametrize("options, words", MISTAKES)
def test_mistakes_are_told(model, options, words):
    with pytest.raises(InputError, match=words):
        Generator(model, **options)

"""Texts longer than the model's positions: a ring of keys and values, against a pass over the whole text in which each
token sees as many."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm.errors import InputError
from odelm.infer.generator import Generator
from odelm.infer.sampling import Sampling
from odelm.models import Inputs, attention
from odelm.models.early_exit import EarlyExit
from tests.thorough import few

PROMPTS = [[3, 1, 4], [5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]]
MODELS = {
    "plain": (dict(), dict(steps=2)),
    "groups": (dict(groups=2, norm_placement="post"), dict()),
    "ends": (dict(depth=6, prelude=1, coda=1), dict(steps=2)),
    "fewer key-value heads": (dict(heads=4, kv_heads=2), dict(steps=2, solver="heun")),
    "shared keys": (dict(kv_span=2), dict()),
}
ROOM = 24


def models_of(make_config, randomise, **options: Any) -> tuple[odelm.CausalLM, odelm.CausalLM]:
    """Returns a model, and one with the same parameters and many more positions."""
    shape = dict(dtype="float32", tie_readout=False, **options)
    short, long = (odelm.create(make_config(**shape, max_length=n), rngs=nnx.Rngs(0)) for n in (ROOM, 128))
    short = randomise(short, scale=0.4)
    nnx.update(long, nnx.state(short, nnx.Param))
    assert isinstance(short, odelm.CausalLM) and isinstance(long, odelm.CausalLM)
    return short, long


def see_only(window: int, monkeypatch) -> None:
    """Lets attention see only so many positions, by the definition."""
    plain = attention.attend

    def narrow(q, k, v, **options):
        query, key = np.arange(q.shape[1])[:, None], np.arange(k.shape[1])[None]
        return plain(q, k, v, mask=jnp.asarray((key > query - window)[None, None]), causal=True, implementation="xla")

    monkeypatch.setattr(attention, "attend", narrow)


@pytest.mark.parametrize(("options", "call"), few(MODELS, "plain", "ends"))
@pytest.mark.parametrize("window", few([5, 1, 16], 5))
def test_a_ring_gives_what_a_pass_over_the_whole_text_gives(options, call, window, make_config, randomise, monkeypatch):
    """Prompts of unequal lengths, shorter and longer than the window, far past the model's positions."""
    short, long = models_of(make_config, randomise, **options)
    generator = Generator(short, window=window, **call)
    found = generator(PROMPTS, new_tokens=50, temperature=2.0, logprobs=True)
    see_only(window, monkeypatch)
    texts = [[*prompt, *one.tokens] for prompt, one in zip(PROMPTS, found, strict=True)]
    for prompt, text, one in zip(PROMPTS, texts, found, strict=True):
        logits = np.asarray(long(jnp.asarray([text]), **call)[0, len(prompt) - 1 : -1])
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(50), one.tokens]
        np.testing.assert_allclose(one.logprobs, expected, atol=2e-4)


def test_a_row_does_not_depend_on_the_others(make_config, randomise):
    generator = Generator(models_of(make_config, randomise)[0], steps=2, window=7)
    together = generator(PROMPTS, new_tokens=40, repetition_penalty=2.0)
    assert [generator([prompt], new_tokens=40, repetition_penalty=2.0)[0] for prompt in PROMPTS] == together
    assert len({tuple(tokens) for tokens in together}) == 3, "rows must differ for this to test anything"


def test_a_wide_window_changes_nothing(make_config, randomise):
    model = models_of(make_config, randomise)[0]
    plain = Generator(model, steps=2)(PROMPTS, new_tokens=8)
    assert Generator(model, steps=2, window=ROOM)(PROMPTS, new_tokens=8) == plain


def test_its_memory_does_not_grow(make_config, randomise):
    generator = Generator(models_of(make_config, randomise)[0], steps=2, window=7)
    for new_tokens in (100, 1000):
        state = generator.begin(PROMPTS, new_tokens, Sampling(), jax.random.key(0))
        assert state.memory.room == generator.places(11, new_tokens) == 16 + 7
        assert generator.memory_bytes(3, 11, new_tokens) == generator.memory_bytes(3, 11, 100)
        kept = state.memory
        arrays = (kept.blocks, kept.real, kept.segments, kept.positions)
        assert sum(x.nbytes for x in jax.tree.leaves(arrays)) == generator.memory_bytes(3, 11, new_tokens)


def test_mistakes_are_told(make_config, randomise):
    model = models_of(make_config, randomise)[0]
    learned = odelm.create(make_config(positions="learned", max_length=ROOM), rngs=nnx.Rngs(0))
    for words, make in {
        "a window needs rotary positions, but model.positions is 'learned'": lambda: Generator(learned, window=4),
        f"window is {ROOM + 1}, expected 1 to model.max_length, {ROOM}": lambda: Generator(model, window=ROOM + 1),
        "window is 0, expected": lambda: Generator(model, window=0),
        "a window does not go with drafts or early exits": lambda: Generator(model, window=4, draft_steps=1),
        "a window does not go with drafts": lambda: Generator(model, window=4, early_exit=EarlyExit(0.1)),
        f"the prompt has 30 tokens, more than model.max_length {ROOM}: shorten it to {ROOM}": lambda: Generator(
            model, window=4
        )([[1] * 30], new_tokens=2),
    }.items():
        with pytest.raises(InputError, match=words):
            make()
    plan = model.plan(steps=2)
    with pytest.raises(InputError, match="drafts are tried for a generator of one grid, without .* a window"):
        odelm.with_fastest_drafts(Generator(model, window=4), [[1, 2]])
    _, memory = model.run(
        Inputs(jnp.ones((1, 3), jnp.int32)), plan, memory=model.memory(plan, batch=1, room=8, window=4)
    )
    small = model.memory(plan, batch=1, room=3, window=4)
    _, small = model.run(Inputs(jnp.ones((1, 3), jnp.int32)), plan, memory=small)
    with pytest.raises(InputError, match="a ring of 3 places is too small for its window of 4"):
        model.run(Inputs(jnp.ones((1, 1), jnp.int32)), plan, memory=small)
    with pytest.raises(InputError, match="room is 0, expected 1 or more"):
        model.memory(plan, batch=1, room=0, window=4)
    with pytest.raises(InputError, match="a ring takes one position at a time after its first ones, but 2 are given"):
        model.run(Inputs(jnp.ones((1, 2), jnp.int32)), plan, memory=memory)

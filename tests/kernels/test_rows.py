"""Several rows decoded at once by kernels that are interpreted without a GPU, against the model's own decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odelm
from odelm.errors import InputError
from odelm.infer import kernel_choice
from tests.thorough import few

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need jax 0.11 or later", allow_module_level=True)

from odelm.infer.decode import Decoding, advance, prefill
from odelm.infer.sampling import sampling_options
from odelm.models.kernels.layout_choice import layout_of
from tests.kernels.test_kernels import INTERPRETED, MODELS, NEW, WORDS, in_kernel, model_of

PROMPT = 20
LENGTHS = (20, 13, 1, 17, 20, 8, 19, 2) * 4


def begun(model: odelm.CausalLM, plan: tuple, rows: int, *, end: int = -1) -> Decoding:
    """Returns the state after prompts of different lengths, padded at their ends."""
    prompts = np.random.default_rng(0).integers(0, WORDS, (rows, PROMPT)).astype(np.int32)
    options = dict(new_tokens=NEW, end=end)
    lengths = jnp.array(LENGTHS[:rows])
    return prefill(model, plan, jnp.asarray(prompts), lengths, sampling_options(), jax.random.key(0), **options)


def assert_same(found: Decoding, expected: Decoding, atol: float = 2e-5) -> None:
    """Asserts equal tokens, and all else equal up to rounding."""
    for name in ("count", "done", "tokens", "last", "positions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=atol)
    np.testing.assert_array_equal(found.memory.real, expected.memory.real)
    np.testing.assert_array_equal(found.memory.length, expected.memory.length)
    for one, other in zip(jax.tree.leaves(found.memory.blocks), jax.tree.leaves(expected.memory.blocks), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


CASES = [
    (2, "default", 1, 3), (8, "parallel", 1, NEW), (3, "ends", 4, 3), (2, "swiglu", 3, 3), (3, "gpt2", 1, 3),
    (3, "grouped", 12, 3), (8, "kv_heads", 5, 3), (5, "groups", 1, 3), (9, "kv_heads", 1, 3), (17, "parallel", 7, 3),
    (32, "swiglu", 1, 3), (32, "default", 4, 3), (24, "ends", 3, 3),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "name", "programs", "until"), few(CASES, *CASES[:3], (9, "kv_heads", 1, 3)))
def test_kernels_decode_several_rows_as_the_model_does(rows, name, programs, until):
    model = model_of(**MODELS[name])
    plan = model.plan(steps=2)
    state = begun(model, plan, rows)
    expected = advance(model, plan, state, sampling_options(), until, end=-1)
    assert_same(in_kernel(model, plan, state, until, programs=programs), expected)


@pytest.mark.parametrize(("rows", "splits", "programs"), few([(2, 1, 1), (1, 2, 1), (3, 2, 5)], (2, 1, 1), (1, 2, 1)))
def test_attention_over_many_chunks_is_that_over_all_places(rows, splits, programs):
    model = model_of(**MODELS["default"])
    plan = model.plan(steps=2)
    state = begun(model, plan, rows)
    expected = advance(model, plan, state, sampling_options(), 3, end=-1)
    found = in_kernel(model, plan, state, 3, programs=programs, chunk=4, chunk_splits=splits)
    assert_same(found, expected)


@pytest.mark.parametrize("programs", few([1, 3], 1))
def test_a_row_that_has_ended_gets_the_end_token_until_all_have(programs):
    model = model_of(parallel_branches=True)
    plan = model.plan(steps=1)
    free = advance(model, plan, begun(model, plan, 3), sampling_options(), NEW, end=-1)
    end = int(free.tokens[0, 2])
    assert (free.tokens == end).sum() == 1
    state = begun(model, plan, 3, end=end)
    state = dataclasses.replace(state, done=jnp.array([False, False, True]))
    expected = advance(model, plan, state, sampling_options(), NEW, end=end)
    assert expected.done.tolist() == [True, False, True] and expected.tokens[0, 3:].tolist() == [end] * (NEW - 3)
    assert_same(in_kernel(model, plan, state, NEW, end=end, programs=programs), expected)
    state = dataclasses.replace(state, done=jnp.array([False, True, True]))
    expected = advance(model, plan, state, sampling_options(), NEW, end=end)
    assert int(expected.count) == 3
    found = in_kernel(model, plan, state, NEW, end=end, programs=programs)
    assert_same(found, expected)
    assert_same(in_kernel(model, plan, found, NEW, end=end, programs=programs), expected)


@pytest.mark.parametrize("programs", few([1, 4], 1))
def test_rows_draw_the_tokens_that_the_model_draws(programs):
    model = model_of(parallel_branches=True)
    plan = model.plan(steps=1)
    state, sampling = begun(model, plan, 3), sampling_options(temperature=3.0)
    expected = advance(model, plan, state, sampling, NEW, end=-1)
    assert len(set(np.asarray(expected.tokens).ravel().tolist())) > 10
    half = in_kernel(model, plan, state, 2, temperature=3.0, programs=programs)
    assert_same(in_kernel(model, plan, half, NEW, temperature=3.0, programs=programs), expected)


def test_rows_have_places_of_their_own_in_the_memory():
    model = model_of()
    plan = model.plan(steps=1)
    state = begun(model, plan, 2)
    lengths = jnp.array(LENGTHS[:2])
    state = dataclasses.replace(state, memory=dataclasses.replace(state.memory, length=lengths))
    expected = advance(model, plan, state, sampling_options(), 3, end=-1)
    assert expected.memory.real[1].tolist() == [i < LENGTHS[1] + 2 for i in range(state.memory.room)]
    assert_same(in_kernel(model, plan, state, 3), expected)


def test_several_rows_are_decoded_by_a_kernel(monkeypatch):
    monkeypatch.setattr(kernel_choice, "INTERPRETED", INTERPRETED)
    model = model_of(parallel_branches=True, dtype="float32")
    prompts, options = [list(range(5, 30)), list(range(40, 47))], dict(new_tokens=3, temperature=2.0, logprobs=True)
    expected = odelm.Generator(model, steps=1, kernel="xla")(prompts, **options)
    generator = odelm.Generator(model, steps=1)
    found = generator(prompts, **options)
    assert str(generator.kernel_choice) == "persistent"
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
    generator = odelm.Generator(model, steps=1, kernel="persistent")
    with pytest.raises(InputError, match="top_k with several rows"):
        generator(prompts, top_k=5, **options)
    with pytest.raises(InputError, match="33 rows; kernels take at most 32"):
        generator(33 * prompts[:1], **options)


def test_several_rows_read_out_in_16_bits():
    model = model_of()
    layout = layout_of(model.config, model.plan(steps=2), 32, rows=2, readout_bits=8)
    assert layout.readout_bits == 16


@pytest.mark.parametrize(("rows", "splits"), [(1, 11), (2, 4), (4, 2), (8, 1), (9, 1), (32, 1)])
def test_programs_are_shared_out_over_rows(rows, splits):
    shape = dict(kind="decoder", vocab_size=WORDS, width=768, heads=12, depth=1, max_length=1024)
    layout = layout_of(odelm.ModelConfig(**shape), model_of().plan(steps=1), 767, rows=rows)
    assert (layout.chunk_splits, layout.fits) == (splits, True)

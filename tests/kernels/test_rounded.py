"""The readout in int8, interpreted without a GPU: the token is that of the rows themselves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odelm
from tests.thorough import few

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need jax 0.11 or later", allow_module_level=True)

from flax import nnx

from odelm.infer.decode import advance
from odelm.infer.sampling import sampling_options
from odelm.models.kernels import tables
from odelm.models.kernels.choice import choose, send_for_readout
from odelm.models.kernels.decode import Kernels, begin_exchange, read_out_of
from odelm.models.kernels.layout import Layout
from odelm.models.kernels.layout_choice import layout_of
from tests.kernels.test_kernels import INTERPRETED, NEW, assert_same, begun, in_kernel, model_of

WORDS, WIDTH = 500, 256


def layout_for(bits: int, programs: int = 1, **options: Any) -> Layout:
    """Returns the layout of a model of `WORDS` rows of `WIDTH`."""
    shape = dict(kind="decoder", vocab_size=WORDS, width=WIDTH, heads=4, depth=1, max_length=64)
    model = odelm.CausalLM(odelm.ModelConfig(**shape), rngs=nnx.Rngs(0))
    options = dict(programs=programs, dtype=jnp.float32, ring=4, ring_slice=128, out_slice=128) | options
    layout = layout_of(model.config, model.plan(steps=1), 16, readout_bits=bits, **options)
    assert layout.readout_bits == (16 if layout.filtered else bits)
    return layout


def read(rows: np.ndarray, states: np.ndarray, layout: Layout, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens that a kernel chooses for states (n, D), and their log-probabilities."""
    kernels, made = Kernels(layout, INTERPRETED), (jnp.int32, jnp.float32)

    def run_readout(program, numbers, state, word, logprob):
        send_for_readout(program, early=True)
        send_for_readout(program, early=False)
        read_out_of(layout)(program, state[...], program.affine("end"), numbers[0])

    def run_choice(program, numbers, state, word, logprob):
        word[0], _, logprob[0] = choose(program, numbers[0])

    launches = [kernels.make(run_readout, programs=layout.programs), kernels.make(run_choice, programs=1)]
    keys = jax.random.split(jax.random.key(3), len(states))
    vectors = {"end_scale": jnp.full(WIDTH, 1.5), "end_shift": jnp.zeros(WIDTH), "keys": jax.random.key_data(keys)}
    vectors |= {"temperature": jnp.full(1, temperature)}
    memory = jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1))

    @jax.jit
    def run(rows, state, number):
        between = jax.tree.map(jax.new_ref, begin_exchange(layout, marked=False))
        found = [jax.new_ref(jnp.zeros(1, dtype)) for dtype in made]
        for launch in launches:
            launch(tables.readout(rows, layout), vectors, memory, between, number.reshape(1), state, *found)
        return [jax.freeze(one)[0] for one in found]

    found = [run(jnp.asarray(rows), jnp.asarray(state), jnp.int32(i)) for i, state in enumerate(states)]
    return tuple(np.array(one) for one in zip(*found, strict=True))  # pyright: ignore


def random_rows(rng: np.random.Generator, states: np.ndarray) -> np.ndarray:
    return rng.normal(size=(WORDS, WIDTH)) * 0.1


def rows_of_nearly_equal_logits(rng: np.random.Generator, states: np.ndarray) -> np.ndarray:
    """For the first state they differ by less than what they are off by with rows of int8, which is another each."""
    along, rows = states[0] / np.linalg.norm(states[0]), random_rows(rng, states)
    return rows + np.outer(0.2 + 1e-4 * rng.normal(size=WORDS) - rows @ along, along)


def nearly_equal_rows(rng: np.random.Generator, states: np.ndarray) -> np.ndarray:
    """All logits of any state are within the bound of their errors, so that all are computed again."""
    return rng.normal(size=WIDTH) * 0.05 + rng.normal(size=(WORDS, WIDTH)) * 1e-5


def rows_of_all_sizes(rng: np.random.Generator, states: np.ndarray) -> np.ndarray:
    return random_rows(rng, states) * 10 ** rng.uniform(-4, 0, size=(WORDS, 1))


def equal_rows(rng: np.random.Generator, states: np.ndarray) -> np.ndarray:
    """Each row is there several times, and many are 0."""
    return np.tile(random_rows(rng, states)[: WORDS // 5], (5, 1)) * (np.arange(WORDS) % 3 > 0)[:, None]


MADE = (random_rows, rows_of_nearly_equal_logits, nearly_equal_rows, rows_of_all_sizes, equal_rows)
CASES = [(make, temperature, 1) for make in MADE for temperature in (0.0, 0.7)] + [(random_rows, 0.7, 3)]


@pytest.mark.parametrize(("make", "temperature", "programs"), CASES)
def test_the_token_is_that_of_the_rows_themselves(make, temperature, programs):
    rng = np.random.default_rng(1)
    states = rng.normal(size=(3, WIDTH)).astype(np.float32)
    rows = make(rng, states).astype(np.float32)
    options = dict(programs=programs, sampled=temperature > 0)
    expected, logprobs = read(rows, states, layout_for(16, **options), temperature)
    found, rounded = read(rows, states, layout_for(8, **options), temperature)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(rounded, logprobs, atol=2e-2)


def test_the_logit_of_the_chosen_word_is_exact_in_the_sum_too():
    rng = np.random.default_rng(4)
    states = rng.normal(size=(1, WIDTH)).astype(np.float32)
    rows = random_rows(rng, states)
    rows[7] += states[0]
    expected, found = (read(rows, states, layout_for(bits), 0.0) for bits in (16, 8))
    assert expected[0] == found[0] == 7
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)  # nearly 0: no other word is likely


@pytest.mark.parametrize("temperature", few([0.0, 3.0], 0.0))
def test_a_kernel_that_rounds_the_readout_decodes_what_the_model_does(temperature):
    model = model_of(parallel_branches=True)
    plan = model.plan(steps=2)
    state = begun(model, plan)
    expected = advance(model, plan, state, sampling_options(temperature=temperature), NEW, end=-1)
    found = in_kernel(model, plan, state, NEW, temperature=temperature, readout_bits=8)
    assert_same(found, expected, atol=2e-2)


def test_no_product_of_a_rounded_row_is_further_off_than_its_bound():
    rng = np.random.default_rng(2)
    for make in MADE:
        rows = make(rng, rng.normal(size=(1, WIDTH)))
        whole, scale, error = map(np.asarray, tables.rounded_rows(jnp.asarray(rows, jnp.float32)))
        missed = rows - scale[:, None] * whole.astype(np.float64)
        worst = np.linalg.norm(missed, axis=1)  # of a state of length 1, in the direction of what is missed
        assert (worst <= error).all()
        assert (error <= 1.001 * worst + 2 * tables.ROUNDING * np.linalg.norm(rows, axis=1)).all()


def test_rows_that_int8_holds_as_they_are_lose_nothing():
    rng = np.random.default_rng(5)
    states = rng.normal(size=(3, WIDTH)).astype(np.float32)
    rows = rng.integers(1, 128, (WORDS, WIDTH))
    rows[:, 0] = 127
    rows = (rows * 0.002).astype(np.float32)
    expected, logprobs = read(rows, states, layout_for(16), 0.0)
    found, rounded = read(rows, states, layout_for(8), 0.0)
    np.testing.assert_array_equal(found, expected)
    # |row| |x| is about 60. The state itself is right to 2^-16 of its length, without its last digit to 2^-11 at most.
    assert logprobs.max() < -0.5, "others have a share in the sum"
    np.testing.assert_allclose(rounded, logprobs, atol=60 * 2**-16)


def test_a_state_without_numbers_gives_a_token():
    states = np.full((1, WIDTH), np.nan, np.float32)
    found, _ = read(random_rows(np.random.default_rng(3), states), states, layout_for(8), 0.0)
    assert 0 <= found[0] < WORDS


def test_top_k_reads_all_rows_as_they_are():
    assert layout_for(8, sampled=True).rounded
    assert not layout_for(8, sampled=True, filtered=True).rounded

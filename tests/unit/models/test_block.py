"""One block alone: its formula, its step sizes, and the agreement of its ways of being called."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from odelm.models import BlockField, SharedBlock
from odelm.ode import RememberingField

# A block chains some 20 float32 sums of up to 24 terms of order one: 100 roundings of 6e-8.
ATOL = 100 * 6e-8
H0 = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)


@pytest.fixture(params=[(False, True), (True, True), (False, False)], ids=["modulated", "parallel", "plain"])
def make_block(request, make_config, randomise):
    parallel, modulation = request.param

    def make(placement):
        config = make_config(norm_placement=placement, parallel_branches=parallel, time_modulation=modulation)
        return randomise(SharedBlock(config, rngs=nnx.Rngs(0)))

    return make


def test_pre_norm_increment(make_block):
    block, t = make_block("pre"), jnp.float32(1.5)
    condition = block.condition(t)
    gate1, gate2 = (1 if gate is None else gate[None, None] for gate in (condition.gate1, condition.gate2))
    a = block.attention(block.norm1(H0, condition.norm1))[0] * gate1
    expected = a + block.feedforward(block.norm2(H0 if block.parallel else H0 + a, condition.norm2)) * gate2
    np.testing.assert_allclose(block.increment(condition, H0)[0], expected, rtol=0, atol=ATOL)
    np.testing.assert_allclose(block(H0, 1.5), H0 + expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("dt", [1.0, 4.0])
def test_post_norm_projection(make_block, dt):
    block, t = make_block("post"), jnp.float32(1.5)
    condition = block.condition(t)
    gate1, gate2 = (1 if gate is None else gate[None, None] for gate in (condition.gate1, condition.gate2))
    a = H0 + dt * gate1 * block.attention(H0)[0]
    if block.parallel:
        expected = block.norm1(a + dt * gate2 * block.feedforward(H0), condition.norm1)
    else:
        a = block.norm1(a, condition.norm1)
        expected = block.norm2(a + dt * gate2 * block.feedforward(a), condition.norm2)
    np.testing.assert_allclose(block.step(condition, H0, dt)[0], expected, rtol=0, atol=ATOL)
    if dt == 1.0:
        np.testing.assert_allclose(block(H0, 1.5), expected, rtol=0, atol=ATOL)
        np.testing.assert_allclose(block.increment(condition, H0)[0], expected - H0, rtol=0, atol=ATOL)


def test_time_matters_only_to_a_modulated_block(make_block):
    block = make_block("pre")
    difference = np.abs(block(H0, 0.0) - block(H0, 3.0)).max()
    assert difference == 0 if block.modulation is None else difference > 1e-3


def test_a_new_modulated_block_is_the_plain_one(make_config):
    plain, modulated = (
        SharedBlock(make_config(time_modulation=modulation), rngs=nnx.Rngs(0)) for modulation in (False, True)
    )
    np.testing.assert_array_equal(plain(H0), modulated(H0, 2.0))


def test_field(make_block):
    block = make_block("pre")
    field = BlockField(block)
    assert isinstance(field, RememberingField)
    expected = block.increment(block.condition(jnp.float32(2)), H0)[0]
    np.testing.assert_allclose(field(jnp.float32(2), H0), expected, rtol=0, atol=ATOL)


def test_bfloat16_states_stay_bfloat16(make_block):
    for placement in ("pre", "post"):
        assert make_block(placement)(H0.astype(jnp.bfloat16), 1.0).dtype == jnp.bfloat16

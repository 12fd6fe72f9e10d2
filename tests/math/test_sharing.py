"""Sharing: how many parameters there are, and that a shared block's gradient is the sum over its uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm.models.modulation import FREQUENCIES, HIDDEN
from tests.thorough import thorough

DEPTH = 4


def count(module: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize("groups", [1, 2, DEPTH])
@pytest.mark.parametrize("modulation", [False, True])
def test_parameter_count(make_config, groups, modulation):
    config = make_config(groups=groups, time_modulation=modulation)
    D, F, K, V = config.width, config.feedforward_size, config.head_size, config.vocab_size
    block = 4 * D * D + 2 * D * F + 2 * D + 2 * K
    if modulation:
        block += (2 * FREQUENCIES + 1) * HIDDEN + (HIDDEN + 1) * 6 * D
    assert count(odelm.create(config, rngs=nnx.Rngs(0))) == V * D + groups * block + D


def test_parameter_count_with_biases_factorised_and_post_norm(make_config):
    config = make_config(
        bias=True, embed_dim=8, norm="layernorm", norm_placement="post", parallel_branches=True, positions="learned"
    )
    D, F, K, V, E = config.width, config.feedforward_size, config.head_size, config.vocab_size, 8
    block = 4 * (D * D + D) + 2 * D * F + F + D + 2 * D + 2 * 2 * K
    block += (2 * FREQUENCIES + 1) * HIDDEN + (HIDDEN + 1) * 4 * D
    expected = (V + config.max_length) * E + 2 * E * D + D + E + block
    assert count(odelm.create(config, rngs=nnx.Rngs(0))) == expected


@pytest.mark.parametrize("placement, modulation", [("pre", True), thorough("pre", False), thorough("post", True)])
def test_gradient_of_a_shared_block_is_the_sum_over_equal_blocks(make_model, tokens, placement, modulation):
    options = dict(time_modulation=modulation, norm_placement=placement)
    shared, unshared = make_model(**options), nnx.clone(make_model(**options, groups=DEPTH))
    nnx.update(unshared.embed, nnx.state(shared.embed))
    if shared.final_norm is not None:
        nnx.update(unshared.final_norm, nnx.state(shared.final_norm))
    for block in unshared.blocks:
        nnx.update(block, nnx.state(shared.blocks[0]))

    def gradient(model):
        graph, params = nnx.split(model)
        weights = np.random.default_rng(0).standard_normal((2, 6, 13)).astype(np.float32)
        loss, grads = jax.jit(jax.value_and_grad(lambda p: jnp.mean(weights * nnx.merge(graph, p)(tokens))))(params)
        return loss, nnx.to_pure_dict(grads)["blocks"]

    (loss, one), (expected_loss, several) = gradient(shared), gradient(unshared)
    summed = jax.tree.map(lambda *leaves: sum(leaves), *several.values())
    # Four blocks forward and back, about 200 chained roundings of 6e-8, relative to each array's largest entry.
    # A term missing from the sum, or one block at another's time, is off by a fraction of it.
    bound = 200 * 6e-8
    np.testing.assert_allclose(loss, expected_loss, rtol=bound, atol=bound)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=bound * np.abs(e).max() + 1e-9), one[0], summed
    )
    first = jax.tree.leaves(several[0])[0]
    assert not np.allclose(first, jax.tree.leaves(several[1])[0], rtol=0.01), "the blocks' gradients should differ"

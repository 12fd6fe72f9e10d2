"""From shared to unshared, exactly; from unshared to shared, exactly where nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import interop
from odelm.config import InitConfig
from odelm.interop.convert import flattened, low_rank
from odelm.models.parameters import parameters
from tests.calls import compiled
from tests.thorough import few
from tests.unit.interop.conftest import ALBERT, GPT2, PLAIN

ATOL = 2e-5
"""Of logits of order one: gates and residuals worked into matrices round each of their products once more."""

SHARED = {
    "gpt2": PLAIN | dict(groups=1),
    "gpt2 modulated": PLAIN | dict(groups=2, time_modulation=True),
    "albert": ALBERT,
    "albert modulated": ALBERT | dict(time_modulation=True),
    "albert low rank": ALBERT | dict(layer_rank=3, groups=2, time_modulation=True),
    "inner": ALBERT | dict(inner_blocks=2, layer_rank=2, time_modulation=True),
    "modern": dict(activation="swiglu", layer_rank=2),
    "wide": dict(wide_modulation=True, activation="swiglu", layer_rank=2, bias=True),
    "wide, post": ALBERT | dict(time_modulation=True, wide_modulation=True),
    "fewer key-value heads": dict(wide_modulation=True, layer_rank=2, bias=True, heads=4, kv_heads=2),
    "another depth's": PLAIN | dict(groups=2, reference_depth=8),
    "another depth's, modulated": dict(reference_depth=2, reference_width=4),
}


@pytest.mark.parametrize("name", few(list(SHARED), "gpt2", "albert low rank"))
def test_unrolled_is_the_same_model_with_blocks_of_its_own(name, make_model, tokens):
    model = make_model(**SHARED[name])
    plain = interop.unrolled(model)
    assert (plain.config.groups, plain.config.time_modulation, plain.config.layer_rank) == (4, False, 0)
    assert not any("modulation" in name or "residual" in name for name in parameters(plain))
    np.testing.assert_allclose(compiled(plain)(tokens), compiled(model)(tokens), rtol=0, atol=ATOL)


def test_a_plain_block_is_unrolled_to_the_bit(make_model):
    model = make_model(**ALBERT)
    plain = parameters(interop.unrolled(model))
    for name, array in parameters(model).items():
        for unit in range(4):
            np.testing.assert_array_equal(plain[name.replace("blocks/0", f"blocks/{unit}")], array)


@pytest.mark.parametrize("options", [PLAIN | dict(groups=4), ALBERT | dict(groups=4)], ids=["pre", "post"])
def test_inner_blocks_become_units_of_depth(options, make_model, tokens):
    model = make_model(**(options | dict(inner_blocks=2)))
    flat = flattened(model)
    assert (flat.config.depth, flat.config.groups, flat.config.inner_blocks) == (8, 8, 1)
    np.testing.assert_allclose(compiled(flat)(tokens), compiled(model)(tokens), rtol=0, atol=ATOL)


def shared(model, **options):
    return interop.shared(model, InitConfig(from_pretrained="x", **options), rngs=nnx.Rngs(1))


STACKS = {"gpt2": GPT2, "albert": ALBERT | dict(groups=4), "inner": ALBERT | dict(groups=4, inner_blocks=2),
          "fewer key-value heads": GPT2 | dict(kv_heads=1)}  # fmt: skip


@pytest.mark.parametrize(
    ("stack", "groups"),
    few(
        [(stack, groups) for stack in STACKS for groups in (1, 2)],
        ("albert", 2),
    ),
)  # fmt: skip
def test_residuals_of_full_rank_lose_nothing(stack, groups, make_model, tokens):
    model = make_model(**STACKS[stack])
    result = shared(model, groups=groups, merge="low_rank", rank=16)
    assert (result.config.groups, result.config.layer_rank) == (groups, 16)
    expected = compiled(model)(tokens)
    np.testing.assert_allclose(compiled(result)(tokens), expected, rtol=0, atol=5 * ATOL)
    truncated = shared(model, groups=groups, merge="low_rank", rank=1)
    assert np.abs(compiled(truncated)(tokens) - expected).max() > 100 * ATOL


def test_mean_and_chosen_layers(make_model):
    given = parameters(make_model(**GPT2))
    name = "blocks/{}/feedforward/up/kernel".format
    mean = parameters(shared(make_model(**GPT2), groups=2))
    np.testing.assert_allclose(mean[name(1)], (given[name(2)] + given[name(3)]) / 2, atol=1e-6)
    for layer, source in ((0, 2), (1, 3), (-1, 3)):
        chosen = parameters(shared(make_model(**GPT2), groups=2, merge="layer", layer=layer))
        np.testing.assert_array_equal(chosen[name(1)], given[name(source)])
    for kept in ("embed/tokens", "final_norm/scale"):
        np.testing.assert_array_equal(mean[kept], given[kept])


def test_equal_layers_are_shared_without_loss(make_model, tokens):
    model = make_model(**(PLAIN | dict(groups=1)))
    stack = interop.unrolled(model)
    again = shared(stack, groups=1)
    np.testing.assert_allclose(compiled(again)(tokens, steps=2), compiled(model)(tokens, steps=2), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(groups=3), "model.groups is 3, which does not divide model.depth"),
        (dict(groups=8), "init.groups is 8, but the model has only 4"),
        (dict(groups=2, merge="layer", layer=2), "init.layer is 2, but a group has 2 layers"),
    ],
)
def test_groups_and_layers_that_cannot_be_are_refused(options, says, make_model):
    with pytest.raises(odelm.InputError, match=says):
        shared(make_model(**GPT2), **options)


@pytest.mark.parametrize("stack", [dict(groups=1), dict(groups=4)], ids=["alike", "different"])
def test_residuals_can_learn_where_there_is_nothing_to_keep(stack, make_model, tokens):
    """Of equal layers the residual is zero, and beyond a matrix's rank too: there its gradient must not be."""
    model = shared(make_model(**(PLAIN | stack)), groups=1, merge="low_rank", rank=20)
    graph, params = nnx.split(model, nnx.Param)
    grads = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(tokens)).mean()))(params)
    up = parameters(nnx.merge(graph, grads))["blocks/0/residual/up/up"]
    assert np.abs(up).max(axis=-1).min() > 0, "a column of the residual is dead"


def test_low_rank_factors_are_the_nearest():
    rng = np.random.default_rng(0)
    matrices = rng.standard_normal((2, 6, 4))
    down, up = low_rank(matrices, 4)
    np.testing.assert_allclose(down @ up, matrices, atol=1e-12)
    down, up = low_rank(matrices, 2)
    values = np.linalg.svd(matrices, compute_uv=False)
    error = np.linalg.norm(down @ up - matrices, axis=(1, 2))
    np.testing.assert_allclose(error, np.sqrt((values[:, 2:] ** 2).sum(1)), rtol=1e-12)
    assert low_rank(matrices, 7)[0].shape == (2, 6, 7)


def test_the_summary_says_what_was_shared(make_model):
    init = InitConfig(from_pretrained="x", groups=2, merge="low_rank", rank=3)
    model = make_model(**GPT2)
    text = interop.summary(model.config, interop.shared(model, init, rngs=nnx.Rngs(0)), init)
    assert "4 blocks as 2" in text and "mean of 2 layers" in text and "rank 3" in text and "M parameters" in text

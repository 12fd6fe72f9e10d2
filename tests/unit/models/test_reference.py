"""What holds at a reference depth and width: the same beginning, and increments and rates that are scaled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm.errors import InputError
from odelm.models import Inputs
from odelm.models.initialize import branch_factor, embedding_factor
from odelm.models.parameters import parameters
from tests.calls import compiled

# Logits of order 3; a factor taken out of a matrix and put behind it rounds each product once more.
ATOL = 3 * 300 * 6e-8
SHAPES = {
    "decoder": dict(),
    "no modulation, post": dict(time_modulation=False, norm_placement="post"),
    "ends, groups": dict(depth=6, prelude=1, coda=1, groups=2),
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_another_reference_depth_is_the_same_model_at_first(options, make_config, tokens):
    config = make_config(**options)
    plain, deep = (odelm.create(make_config(**options, reference_depth=depth), rngs=nnx.Rngs(0)) for depth in (None, 3))
    factor = branch_factor(deep.config)
    assert factor < 1 and branch_factor(config) == 1
    if not config.ends:
        assert factor == pytest.approx(3 / config.depth)
    np.testing.assert_allclose(compiled(deep)(tokens), compiled(plain)(tokens), rtol=0, atol=ATOL)
    own, its = parameters(deep), parameters(plain)
    for name, leaf in own.items():
        scale = 1 / factor if name.endswith(("attention/out/kernel", "feedforward/down/kernel")) else 1
        np.testing.assert_allclose(leaf, scale * its[name], rtol=1e-6, err_msg=name)


def test_its_own_depth_and_width_as_the_reference_change_nothing(make_config, make_model, tokens):
    model = make_model(depth=4, width=16)
    same = make_model(depth=4, width=16, reference_depth=4, reference_width=16)
    np.testing.assert_array_equal(compiled(model)(tokens), compiled(same)(tokens))


@pytest.mark.parametrize("options", [dict(), dict(kind="encoder", tie_readout=False, positions="learned")])
def test_a_reference_width_scales_what_enters_and_what_is_read(options, make_model, tokens):
    model, plain = make_model(reference_width=4, **options), make_model(**options)
    assert embedding_factor(model.config) == 2
    np.testing.assert_allclose(model.embed(Inputs(tokens)), 2 * plain.embed(Inputs(tokens)), rtol=1e-6)
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 16)), jnp.float32)
    bias = model.head.bias[...][None, None] if model.config.kind == "encoder" else 0
    np.testing.assert_allclose(2 * (model.readout(hidden) - bias), plain.readout(hidden) - bias, rtol=0, atol=ATOL)
    factorised = make_model(reference_width=4, embed_dim=8)
    assert embedding_factor(factorised.config) == 1


@pytest.mark.thorough
def test_a_model_that_is_deeper_moves_as_far(make_config, tokens):
    """One update of the same size in each coordinate changes the state as much at depth 4 and at 16."""

    def moved(depth: int, reference: int | None) -> float:
        config = make_config(depth=depth, reference_depth=reference, time_modulation=False)
        model = odelm.create(config, rngs=nnx.Rngs(0))
        graph, params = nnx.split(model)

        def energy(params):
            return jnp.square(nnx.merge(graph, params).encode(tokens) - target).mean()

        target = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 16)), jnp.float32)
        signs = jax.tree.map(jnp.sign, jax.jit(jax.grad(energy))(params))
        after = jax.tree.map(lambda p, s: p - 1e-4 * s, params, signs)
        moves = compiled(nnx.merge(graph, after).encode)(tokens) - compiled(model.encode)(tokens)
        return float(jnp.abs(moves).mean())

    assert moved(16, 4) == pytest.approx(moved(4, 4), rel=0.3)
    assert moved(16, None) > 2 * moved(4, None)


def test_a_reference_that_is_no_depth_is_refused(make_config):
    with pytest.raises(InputError, match="model.reference_depth is 2, expected more than the 2 layers"):
        make_config(depth=6, prelude=1, coda=1, reference_depth=2).validate()
    with pytest.raises(InputError, match="model.reference_width is 0, expected a positive"):
        make_config(reference_width=0).validate()

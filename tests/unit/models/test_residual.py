"""The low-rank residuals of a block are a continuous function of time, exact at whole times, zero at first."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm.models import Inputs, LayerDelta
from tests.calls import compiled, jitted


@pytest.fixture(scope="module")
def residual(make_config, randomise):
    """Residuals of a block whose stretch is [2, 4): layers at 2 and 3."""
    config = make_config(groups=2, layer_rank=3, bias=True)
    return randomise(LayerDelta(config, start=2.0, two_norms=True, rngs=nnx.Rngs(0)), scale=1.0)


def matrix_at(residual, t: float) -> np.ndarray:
    delta = residual(jnp.float32(t)).up
    return np.asarray(delta.down @ delta.up)


def test_whole_times_have_the_layer_that_stood_there(residual):
    for layer in (0, 1):
        expected = residual.up.down[...][layer] @ residual.up.up[...][layer]
        np.testing.assert_allclose(matrix_at(residual, 2.0 + layer), expected, atol=1e-5)
        found = residual(jnp.float32(2.0 + layer))
        np.testing.assert_array_equal(found.up.bias, residual.up.bias[...][layer])
        np.testing.assert_array_equal(found.norm1.scale, residual.norm1.scale[...][layer])


def test_between_them_it_is_linear_and_past_the_last_it_stays(residual):
    first, last = matrix_at(residual, 2), matrix_at(residual, 3)
    np.testing.assert_allclose(matrix_at(residual, 2.25), 0.75 * first + 0.25 * last, atol=1e-5)
    np.testing.assert_allclose(matrix_at(residual, 4), last, atol=1e-5)
    np.testing.assert_allclose(matrix_at(residual, 3.999), last, atol=1e-5)
    quarter = residual(jnp.float32(2.25)).norm2.bias
    table = residual.norm2.bias[...]
    np.testing.assert_allclose(quarter, 0.75 * table[0] + 0.25 * table[1], atol=1e-6)


@pytest.mark.parametrize("options", [dict(), dict(norm_placement="post", bias=True, activation="swiglu")])
def test_a_new_model_starts_as_the_shared_one(options, make_config, tokens):
    plain = odelm.create(make_config(**options), rngs=nnx.Rngs(0))
    with_residual = odelm.create(make_config(layer_rank=2, **options), rngs=nnx.Rngs(0))
    from odelm.models.parameters import parameters, with_parameters

    same = with_parameters(with_residual, parameters(with_residual) | parameters(plain))
    np.testing.assert_allclose(compiled(same)(tokens), compiled(plain)(tokens), rtol=0, atol=1e-6)


LAYERS = {
    f"{name}, {placement}": (options, placement)
    for placement in ("pre", "post")
    for name, options in {
        "residuals": dict(groups=2, layer_rank=2),
        "chain": dict(groups=2, inner_blocks=2),
        "both": dict(inner_blocks=2, layer_rank=1, wide_modulation=True),
    }.items()
}


@pytest.mark.thorough
@pytest.mark.parametrize(("options", "placement"), LAYERS.values(), ids=LAYERS)
def test_every_parameter_has_an_effect_and_every_grid_works(options, placement, make_model, tokens):
    import jax

    graph, params = nnx.split(make_model(norm_placement=placement, bias=True, **options))

    def loss(params, steps):
        return jnp.square(nnx.merge(graph, params)(tokens, steps=steps)).mean()

    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, 4)
    silent = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert np.isfinite(value) and not silent, silent
    assert np.isfinite(jax.jit(loss, static_argnums=1)(params, 2))


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_chain_is_its_blocks_one_after_the_other(placement, make_model, tokens):
    model = make_model(norm_placement=placement, inner_blocks=2)

    def in_turn(model):
        h = model.embed(Inputs(tokens))
        for t in range(model.config.depth):
            for block in model.blocks[0].inner:
                h = block(h, t)
        return h if model.final_norm is None else model.final_norm(h)

    np.testing.assert_allclose(compiled(model.encode)(tokens), jitted(in_turn, model), rtol=0, atol=1e-5)

"""Lanes of state around the core: what they compute, written out, and that a new model of several is one of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import interop
from odelm.errors import InputError
from odelm.models import Inputs
from odelm.models.modulation import time_features
from odelm.models.parameters import parameters, with_parameters
from tests.calls import compiled, jitted
from tests.thorough import few

# A model of six blocks chains about 150 float32 sums of up to 24 terms; states are of order 3.
ATOL = 3 * 300 * 6e-8
SHAPES = {
    "plain": dict(lanes=2),
    "ends, groups": dict(lanes=3, depth=6, prelude=1, coda=1, groups=2, layer_rank=2),
    "chain": dict(lanes=2, inner_blocks=2, time_modulation=False),
}


@pytest.mark.parametrize("options", few(SHAPES, next(iter(SHAPES))))
def test_a_new_model_of_lanes_is_that_of_one_lane(options, make_config, tokens):
    model = odelm.create(make_config(**options), rngs=nnx.Rngs(0))
    plain = odelm.create(make_config(**(options | dict(lanes=1))), rngs=nnx.Rngs(0))
    own = {name.replace("/inner/", "/", 1) if name.startswith("blocks/") else name: leaf
           for name, leaf in parameters(model).items()}  # fmt: skip
    plain = with_parameters(plain, {name: own[name] for name in parameters(plain)})
    np.testing.assert_allclose(compiled(model)(tokens, steps=2), compiled(plain)(tokens, steps=2), rtol=0, atol=ATOL)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("steps", few([4, 2], 4))
def test_they_are_read_written_and_mixed(options, steps, make_model, tokens):
    model = make_model(**options)
    expected = jitted(lambda model: written_out(model, tokens, steps), model)
    np.testing.assert_allclose(compiled(model.encode)(tokens, steps=steps), expected, rtol=0, atol=ATOL)


def written_out(model, tokens, steps):
    config, h = model.config, model.embed(Inputs(tokens))
    for block in model.prelude:
        h = block(h)
    lanes, size = [h] * config.lanes, config.core / steps
    for step in range(steps):
        t = step * size
        block = model.blocks[int(t) * config.groups // config.core]
        weights = block.weights[...]
        if block.by_time is not None:
            weights = weights + time_features(jnp.float32((config.prelude + t) / config.depth)) @ block.by_time[...]
        read, write, *mix = jnp.split(weights, [config.lanes * (1 + i) for i in range(config.lanes + 1)])
        x = sum(read[i] * lane for i, lane in enumerate(lanes))
        slope, _ = block.inner.increment(block.inner.condition(jnp.float32(t)), x)
        lanes = [
            lane + size * (write[i] * slope + sum(mix[i][j] * other for j, other in enumerate(lanes)))
            for i, lane in enumerate(lanes)
        ]
    h = sum(lanes) / config.lanes
    for block in model.coda:
        h = block(h)
    return model.final_norm(h)


@pytest.mark.thorough
def test_every_parameter_has_an_effect(make_model, tokens):
    graph, params = nnx.split(make_model(**SHAPES["ends, groups"]))
    gradients = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(tokens)).mean()))(params)
    silent = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(gradients) if not np.any(g)]
    assert not silent, silent


@pytest.mark.thorough
def test_every_integration_crosses_them(make_model, tokens):
    model = make_model(**SHAPES["plain"])
    scanned = compiled(model.encode)(tokens, steps=2, solver="heun")
    walked = compiled(model.encode)(tokens, plan=model.plan(steps=2, solver="heun", integrator="diffrax"))
    np.testing.assert_allclose(walked, scanned, rtol=0, atol=ATOL)
    fine, evaluations = compiled(model.encode_adaptive)(tokens, tolerance=1e-4)
    # Fewer than 100 steps each off by the tolerance of a state of order one.
    np.testing.assert_allclose(fine, compiled(model.encode)(tokens, steps=64, solver="rk4"), rtol=0, atol=100 * 1e-4)
    assert 4 < int(evaluations) < 500


def test_a_post_norm_model_and_an_export_are_refused(make_config, make_model, tmp_path):
    with pytest.raises(InputError, match="model.lanes is 2, but a post-norm block writes its whole state"):
        make_config(lanes=2, norm_placement="post").validate()
    model = make_model(**SHAPES["plain"])
    with pytest.raises(InputError, match="model.lanes is 2, but separate layers have one state"):
        interop.unrolled(model)
    with pytest.raises(InputError, match=r"no equivalent in GPT2 of .*model\.lanes=2"):
        interop.export(model, tmp_path / "folder")

"""Euler's method with unit steps is the ordinary stack of layers, bit for bit.

XLA compiles the body of a loop apart from what surrounds it, and may order a sum otherwise there. So the two
sides are compared under the same control flow: the unrolled integration with a Python loop over the layers, the
rolled one with a `lax.scan` over them. Between the two there is rounding, which the last test bounds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from odelm.models import Inputs
from tests.thorough import few

# Every three of the four options in all their combinations (the last column is the parity of the others).
CASES = [
    (placement, norm, parallel, (placement == "post") ^ (norm == "rmsnorm") ^ parallel)
    for placement in ("pre", "post")
    for norm in ("layernorm", "rmsnorm")
    for parallel in (False, True)
]
# Each value of each of them.
CHOSEN = [CASES[number] for number in (0, 3, 5)]


def functions(model):
    """Returns the integration and the explicit stack, both of (params, tokens), and the parameters."""
    graph, params = nnx.split(model)

    def integrated(params, tokens, unroll):
        model = nnx.merge(graph, params)
        return model.encode(tokens, plan=model.plan(unroll=unroll))

    def stacked(params, tokens, unroll):
        model = nnx.merge(graph, params)
        block, h = model.blocks[0], model.embed(Inputs(tokens))
        if unroll:
            for t in range(model.config.depth):
                h = block(h, t)
        else:
            times = jnp.arange(model.config.depth, dtype=jnp.float32)
            h, _ = jax.lax.scan(lambda h, t: (block(h, t), None), h, times)
        return h if model.final_norm is None else model.final_norm(h)

    # Without optimisation the products of a loop's body are rounded otherwise than those of a vmap.
    options = {"xla_backend_optimization_level": 3}
    return *(jax.jit(f, static_argnums=2, compiler_options=options) for f in (integrated, stacked)), params


@pytest.mark.parametrize("placement, norm, parallel, modulation", few(CASES, *CHOSEN))
def test_unrolled_is_the_stack_bitwise(make_model, tokens, placement, norm, parallel, modulation):
    model = make_model(
        norm_placement=placement,
        norm=norm,
        parallel_branches=parallel,
        time_modulation=modulation,
        bias=norm == "layernorm",
    )
    integrated, stacked, params = functions(model)
    np.testing.assert_array_equal(integrated(params, tokens, True), stacked(params, tokens, True))


@pytest.mark.parametrize("placement", few(["pre", "post"], "post"))
def test_rolled_is_the_scanned_stack_and_differs_from_unrolled_by_rounding(make_model, tokens, placement):
    integrated, stacked, params = functions(
        make_model(norm_placement=placement, norm="layernorm", bias=True, parallel_branches=False, time_modulation=True)
    )
    rolled = integrated(params, tokens, False)
    np.testing.assert_array_equal(rolled, stacked(params, tokens, False))
    # Four blocks of a handful of sums over at most 24 terms, each off by up to a few units of 1.2e-7 of a state
    # of size 3: 100 units in all.
    np.testing.assert_allclose(rolled, integrated(params, tokens, True), rtol=0, atol=3 * 100 * 1.2e-7)

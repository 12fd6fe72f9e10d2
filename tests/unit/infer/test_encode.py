"""A model made ready to run computes what the model does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from odelm.infer.encode import Runner, cast_matrices, make_forward


@pytest.mark.parametrize(("groups", "solver"), [(1, "euler"), (2, "heun")])
def test_precomputed_plan_gives_the_same_logits(make_model, tokens, groups, solver):
    model = make_model(groups=groups, dtype="float32")
    runner = Runner.of(model)
    logits = make_forward(runner.graph)(runner.params, runner.plan(2, solver), jnp.asarray(tokens))
    # The same arithmetic in float32, fused differently: a few roundings over two steps of logits of size 1.
    np.testing.assert_allclose(logits, model(tokens, steps=2, solver=solver), rtol=1e-4, atol=1e-5)
    assert np.abs(logits - model(tokens, steps=4)).max() > 1e-3, "the plan must matter for this to test anything"


def test_one_trace_a_step_count(make_model, tokens):
    runner = Runner.of(make_model(dtype="float32"))
    forward = make_forward(runner.graph)
    for steps in (2, 4, 2, 4):
        forward(runner.params, runner.plan(steps, "euler"), jnp.asarray(tokens))
    assert forward._cache_size() == 2


def test_only_matrices_of_products_are_cast(make_model):
    params = nnx.state(make_model(bias=True, norm="layernorm", embed_dim=8), nnx.Param)
    leaves = jax.tree_util.tree_leaves_with_path(cast_matrices(params, jnp.bfloat16))
    dtypes = {"/".join(str(getattr(key, "key", key)) for key in path): leaf.dtype for path, leaf in leaves}
    kept = {name for name, dtype in dtypes.items() if dtype == jnp.float32}
    for name in dtypes:
        small = "modulation" in name or "norm" in name or "bias" in name or "scale" in name
        assert (name in kept) == small, name
    assert any("modulation" in name for name in kept) and any("norm" in name for name in kept)
    assert any("tokens" in name for name in set(dtypes) - kept)

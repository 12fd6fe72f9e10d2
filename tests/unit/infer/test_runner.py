"""A model made ready to run computes what the model does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from odelm.infer.runner import Runner, in_compute_dtypes, make_forward, with_options
from odelm.models.parameters import parameters
from tests.calls import compiled


@pytest.mark.parametrize(("groups", "solver"), [(1, "euler"), (2, "heun")])
def test_precomputed_plan_gives_the_same_logits(make_model, tokens, groups, solver):
    model = make_model(groups=groups, dtype="float32")
    runner = Runner.of(model)
    logits = make_forward(runner.graph)(runner.params, runner.plan(2, solver), jnp.asarray(tokens))
    # The same arithmetic in float32, fused differently: a few roundings over two steps of logits of size 1.
    np.testing.assert_allclose(logits, compiled(model)(tokens, steps=2, solver=solver), rtol=1e-4, atol=1e-5)
    full = compiled(model)(tokens, steps=4)
    assert np.abs(logits - full).max() > 1e-3, "the plan must matter for this to test anything"


def test_one_trace_a_step_count(make_model, tokens):
    runner = Runner.of(make_model(dtype="float32"))
    forward = make_forward(runner.graph)
    for steps in (2, 4, 2, 4):
        forward(runner.params, runner.plan(steps, "euler"), jnp.asarray(tokens))
    assert forward._cache_size() == 2  # pyright: ignore


MODELS = [
    dict(),
    dict(tie_readout=False, bias=True, activation="swiglu"),
    dict(depth=6, prelude=1, coda=1, embed_dim=8, layer_rank=2),
    dict(kind="encoder", embed_dim=8, norm="layernorm", norm_placement="post", embed_norm=True, positions="learned",
         bias=True),
]  # fmt: skip


@pytest.mark.parametrize("options", MODELS, ids=["tied", "untied", "ends", "encoder"])
def test_inference_computes_what_evaluation_in_training_computes(make_model, tokens, options):
    """In bfloat16, bit for bit: casting ahead of a call rounds what the call itself would round, and nothing else."""
    model = make_model(dtype="bfloat16", **options)
    runner = Runner.of(model)
    graph, params = nnx.split(model)
    expected = jax.jit(lambda params: nnx.merge(graph, params)(tokens, steps=2))(params)
    found = make_forward(runner.graph)(runner.params, compiled(model.plan)(steps=2), jnp.asarray(tokens))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_made_ready_takes_other_options(make_model, tokens, tied):
    model = make_model(dtype="bfloat16", tie_readout=tied)
    ready = with_options(Runner.of(model).model, kv_span=2)
    expected = Runner.of(with_options(model, kv_span=2)).model
    assert ready.config.kv_span == 2
    np.testing.assert_array_equal(compiled(ready)(tokens), compiled(expected)(tokens))


def test_a_structure_is_hashed_once(make_model, tokens, monkeypatch):
    """It is an argument of jitted functions, which hash it in each call."""
    model = make_model(dtype="float32")
    runner, same, other = Runner.of(model), Runner.of(model), Runner.of(make_model(dtype="float32", activation="relu"))
    read: Any = jax.jit(lambda graph, params: nnx.merge(graph, params)(tokens, steps=2), static_argnums=0)
    read(runner.graph, runner.params)
    hashed = []
    monkeypatch.setattr(nnx.GraphDef, "__hash__", hashed.append)
    read(runner.graph, runner.params)
    read(same.graph, same.params)
    assert not hashed and read._cache_size() == 1, "equal structures share a program"
    assert runner.graph != other.graph and runner.graph != model
    read(other.graph, other.params)
    assert read._cache_size() == 2


def test_matrices_have_the_dtype_that_their_modules_compute_in(make_model):
    model = make_model(dtype="bfloat16", kind="encoder", embed_dim=8, sentence_order=True, token_types=2)
    own, cast = parameters(model), parameters(in_compute_dtypes(model))
    assert set(cast) - set(own) == {"head/tokens"}
    half = {name for name, array in cast.items() if array.dtype == jnp.bfloat16}
    block = {"attention/qkv", "attention/out", "feedforward/up", "feedforward/down"}
    assert half == {"head/tokens", "head/project/kernel", "head/project/bias"} | {
        f"blocks/0/{name}/kernel" for name in block
    }
    assert all(array.dtype == jnp.float32 for array in parameters(make_model(dtype="float32")).values())
    assert all(array.dtype == jnp.float32 for array in own.values())

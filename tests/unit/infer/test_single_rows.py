"""Maps that are laid out for one row give the tokens that the others give, and are taken where they pay."""

import jax
import numpy as np
import pytest
from flax import nnx

from odelm.infer import single_rows
from odelm.infer.generator import Generator

MODELS = {
    "plain": dict(),
    "every part": dict(
        depth=6, prelude=1, coda=1, bias=True, heads=4, kv_heads=2, layer_rank=2, wide_modulation=True,
        activation="swiglu",
    ),
    "chain": dict(inner_blocks=2, parallel_branches=True),
    "lanes": dict(lanes=2),
}  # fmt: skip


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_kernels_with_their_inputs_last_compute_the_same(options, make_model, tokens):
    model = make_model(**options)
    turned = single_rows.with_inputs_last(model)
    graph, params = nnx.split(turned)
    kernels = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.split(model)[1]) if path[-1] == "kernel"}
    others = {path: leaf.shape for path, leaf in nnx.to_flat_state(params) if path[-1] == "kernel"}
    moved = [path for path, shape in kernels.items() if others[path] != shape]
    assert len(moved) >= 4 * len(model.blocks), "queries, keys and values; out; up; down"
    assert not any("modulation" in path for path in moved)
    found = jax.jit(lambda params: nnx.merge(graph, params)(tokens))(params)
    np.testing.assert_allclose(found, jax.jit(lambda: model(tokens))(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draft_steps", [None, 1])
def test_one_row_is_generated_with_them_on_a_gpu(draft_steps, make_model, monkeypatch):
    model = make_model(depth=4)
    plain = Generator(model, draft_steps=draft_steps)([[3, 1, 4]], new_tokens=6, logprobs=True)[0]
    rows = []

    def on_a_gpu(model, count):
        rows.append(count)
        return single_rows.with_inputs_last(model)

    jax.clear_caches()
    monkeypatch.setattr("odelm.infer.decode.for_single_rows", on_a_gpu)
    monkeypatch.setattr("odelm.infer.speculate.for_single_rows", on_a_gpu)
    found = Generator(model, draft_steps=draft_steps)([[3, 1, 4]], new_tokens=6, logprobs=True)[0]
    assert rows == [1]
    assert found.tokens == plain.tokens
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-5)


def test_they_are_for_one_row_on_one_gpu(make_model, monkeypatch):
    model = make_model()
    assert single_rows.for_single_rows(model, 1) is model  # a CPU is slower so
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert single_rows.for_single_rows(model, 2) is model
    assert single_rows.for_single_rows(model, 1) is not model
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert single_rows.for_single_rows(model, 1) is model

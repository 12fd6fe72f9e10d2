"""What is decoded as on a GPU is what is decoded elsewhere."""

import jax
import numpy as np
import pytest
from flax import nnx

from odelm.infer import on_gpu
from odelm.infer.generator import Generator
from tests.thorough import few

MODELS = {
    "plain": dict(),
    "every part": dict(
        depth=6, prelude=1, coda=1, bias=True, heads=4, kv_heads=2, layer_rank=2, wide_modulation=True,
        activation="swiglu",
    ),
    "chain": dict(inner_blocks=2, parallel_branches=True),
    "lanes": dict(lanes=2),
}  # fmt: skip


@pytest.mark.parametrize("options", few(MODELS, "every part"))
def test_kernels_with_their_inputs_last_compute_the_same(options, make_model, tokens):
    model = make_model(**options)
    turned = on_gpu.with_inputs_last(model)
    graph, params = nnx.split(turned)
    kernels = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.split(model)[1]) if path[-1] == "kernel"}
    others = {path: leaf.shape for path, leaf in nnx.to_flat_state(params) if path[-1] == "kernel"}
    moved = [path for path, shape in kernels.items() if others[path] != shape]
    assert len(moved) >= 4 * len(model.blocks), "queries, keys and values; out; up; down"
    assert not any("modulation" in path for path in moved)
    found = jax.jit(lambda params: nnx.merge(graph, params)(tokens))(params)
    np.testing.assert_allclose(found, jax.jit(lambda: model(tokens))(), rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("draft_steps", [None, 1], ids=["plain", "drafts"])
@pytest.mark.parametrize("prompts", [[[3, 1, 4]], [[3, 1, 4], [5, 9]]], ids=["one row", "two rows"])
def test_a_gpu_decodes_what_a_cpu_does(prompts, draft_steps, make_model, monkeypatch):
    model = make_model(depth=2)

    def decoded():
        jax.clear_caches()
        return Generator(model, draft_steps=draft_steps)(prompts, new_tokens=6, logprobs=True)

    plain, chosen, ready = decoded(), [], on_gpu.ready

    def on_a_gpu(model, plan, rows):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")
            found = ready(model, plan, rows)
        chosen.append((rows, found[0] is not model, found[1][0].unroll))
        return found

    monkeypatch.setattr(on_gpu, "ready", on_a_gpu)
    found = decoded()
    rows = len(prompts)
    assert chosen[0] == (rows, rows == 1, 1 if rows == 1 else True)
    assert chosen[1:] == ([] if draft_steps is None else [(rows * 5, False, True)]), "a draft of 4 and one more"
    for one, other in zip(found, plain, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_nothing_is_changed_on_a_cpu_or_a_mesh(make_model, monkeypatch):
    model = make_model()
    plan = model.plan()
    assert on_gpu.ready(model, plan, 1) == (model, plan)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert on_gpu.ready(model, plan, 1)[0] is not model
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert on_gpu.ready(model, plan, 1)[0] is model

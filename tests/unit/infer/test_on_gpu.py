"""What is computed as on a GPU is what is computed elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm.infer import encoder_runner, on_gpu
from odelm.infer.encoder_runner import EncoderRunner
from odelm.infer.generator import Generator
from odelm.infer.narrowing import make_leaving
from odelm.infer.runner import Runner, make_forward
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


ENCODER = dict(
    kind="encoder", norm="layernorm", norm_placement="post", positions="learned", qk_norm=False, bias=True, depth=4
)  # fmt: skip


@pytest.mark.parametrize("options", [dict(), dict(bias=False, groups=2), dict(norm_placement="pre", prelude=1)])
def test_an_encoder_reads_on_a_gpu_what_it_does_elsewhere(options, make_model, tokens, monkeypatch):
    model = make_model(**ENCODER | options)
    plan = model.plan(steps=2)
    expected = jax.jit(lambda: model(tokens, plan=plan))()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    few, many = (on_gpu.ready_to_read(model, plan, count) for count in (on_gpu.VERY_MANY - 1, on_gpu.VERY_MANY))
    assert few[0] is model
    kernels = [leaf.shape for path, leaf in nnx.to_flat_state(nnx.split(many[0])[1]) if "separate" in path]
    assert len(kernels) == (6 if model.config.bias else 3) * (len(model.blocks) + len(model.prelude))
    monkeypatch.undo()
    for ready, its_plan in (few, many):
        assert [part.unroll for part in its_plan] == [True] * len(plan)
        found = jax.jit(lambda ready=ready, its_plan=its_plan: ready(tokens, plan=its_plan))()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(qk_norm=True), dict(positions="rotary"), dict(layer_rank=2)])
def test_one_product_is_left_where_more_is_done_to_it(options, make_model):
    model = make_model(**ENCODER | options)
    assert on_gpu.with_separate_maps(model) is model


def test_fewer_key_value_heads_have_their_own_map_already(make_model, tokens):
    model = make_model(**ENCODER | dict(heads=4, kv_heads=2))
    np.testing.assert_array_equal(on_gpu.with_separate_maps(model)(tokens), model(tokens))


def test_many_tokens_are_read_by_a_program_of_their_own(monkeypatch):
    read = on_gpu.BySize(lambda given, tokens: given + tokens.size, texts=1)
    few, many = jnp.zeros(on_gpu.MANY - 1), jnp.zeros(on_gpu.MANY)
    chosen = [[], []]
    monkeypatch.setattr(read, "_few", lambda *given: chosen[0].append(given[1].size))
    monkeypatch.setattr(read, "_many", lambda *given: chosen[1].append(given[1].size))
    read(1, many)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    read(1, few)
    read(1, many)
    assert chosen == [[on_gpu.MANY, on_gpu.MANY - 1], [on_gpu.MANY]], "XLA's options for a GPU are for a GPU"


def test_texts_are_read_as_on_a_gpu_by_who_reads_them(make_model, tokens, monkeypatch):
    model = make_model(**ENCODER | dict(dtype="float32", depth=6))
    texts = [[1, 2, 3], [4, 5]]
    runner = Runner.of(model)
    plan, forward = runner.plan(2, "euler"), make_forward(runner.graph)
    rule = odelm.EarlyExit(2.0)
    leaving = (
        EncoderRunner(model, early_exit=rule),
        make_leaving(runner.graph),
        runner.plan(model.config.depth, "euler"),
    )

    def left():
        return leaving[0].embed(texts), *leaving[1](runner.params, leaving[2], rule, jnp.asarray(tokens))

    expected = EncoderRunner(model, steps=2).embed(texts), forward(runner.params, plan, jnp.asarray(tokens)), *left()
    assert 3 <= max(expected[-1]) < model.config.depth, "they leave early"
    assert not np.allclose(expected[2], EncoderRunner(model).embed(texts), atol=1e-3), "these too"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for name in ("MANY", "VERY_MANY"):
        monkeypatch.setattr(on_gpu, name, 1)
    jax.clear_caches()  # of traces, which do not know of another backend
    apart, separate = [], on_gpu.with_separate_maps
    monkeypatch.setattr(on_gpu, "with_separate_maps", lambda model: apart.append(model) or separate(model))
    before = encoder_runner._encode._many._cache_size()
    found = EncoderRunner(model, steps=2).embed(texts), forward(runner.params, plan, jnp.asarray(tokens)), *left()
    assert encoder_runner._encode._many._cache_size() == before + 2 and len(apart) == 4
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    jax.clear_caches()
    inside = jax.jit(lambda tokens: forward(runner.params, plan, tokens))(jnp.asarray(tokens))
    np.testing.assert_allclose(inside, expected[1], rtol=1e-5, atol=1e-5)
    jax.clear_caches()


def test_nothing_is_changed_on_a_cpu_or_a_mesh(make_model, monkeypatch):
    model = make_model()
    plan = model.plan()
    assert on_gpu.ready(model, plan, 1) == (model, plan)
    assert on_gpu.ready_to_read(make_model(**ENCODER), plan, 10_000)[1] is plan
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert on_gpu.ready(model, plan, 1)[0] is not model
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert on_gpu.ready(model, plan, 1)[0] is model

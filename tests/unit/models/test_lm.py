"""The models as people hold them: shapes, option combinations, padding, classifiers, compilation, mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import ode
from odelm.errors import InputError
from odelm.models import BlockField, CausalLM, Classifier, Inputs, MaskedLM
from tests.calls import compiled, jitted
from tests.thorough import few, thorough

# A model of four blocks chains about 100 float32 sums of up to 24 terms; logits are of order 3.
ATOL = 3 * 200 * 6e-8

COMBINATIONS = [
    dict(norm="layernorm", norm_placement="pre", activation="gelu", positions="learned", bias=True, qk_norm=False),
    dict(norm="rmsnorm", norm_placement="post", activation="swiglu", positions="rotary", parallel_branches=True),
    dict(norm="layernorm", norm_placement="post", activation="relu2", positions="sinusoidal", embed_dim=8),
    dict(norm="rmsnorm", norm_placement="pre", activation="relu2", positions="learned", tie_readout=False),
    dict(norm="layernorm", norm_placement="pre", activation="swiglu", positions="rotary", embed_dim=8, bias=True),
    dict(norm="rmsnorm", norm_placement="pre", activation="gelu_tanh", positions="sinusoidal", parallel_branches=True),
    dict(kind="encoder", norm="layernorm", norm_placement="post", activation="gelu", embed_dim=8, bias=True),
    dict(kind="encoder", norm="rmsnorm", activation="swiglu", positions="learned", token_types=2, groups=2),
    dict(kind="encoder", norm_placement="post", positions="sinusoidal", qk_norm=False, tie_readout=False),
    dict(kind="decoder", norm_placement="post", positions="learned", groups=4, time_modulation=False, embed_norm=True),
    dict(kind="decoder", dtype="bfloat16", residual_dtype="float32", token_types=2),
    dict(kind="decoder", dtype="bfloat16", norm_placement="post", bias=True),
]
NAMED = {" ".join(map(str, options.values())): options for options in COMBINATIONS}


@pytest.mark.parametrize("options", few(NAMED, *[name for i, name in enumerate(NAMED) if i % 3 == 0]))
def test_combinations_give_finite_float32_logits_and_gradients(make_model, tokens, options):
    graph, params = nnx.split(make_model(**options))

    def mean(params):
        logits = nnx.merge(graph, params)(tokens, steps=4)
        return jnp.mean(jnp.square(logits)), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    assert (logits.shape, logits.dtype) == ((2, 6, 13), jnp.float32)
    assert jnp.isfinite(logits).all()
    flat = jax.tree_util.tree_leaves_with_path(grads)
    silent = [jax.tree_util.keystr(path) for path, leaf in flat if not np.any(leaf)]
    assert not silent, f"parameters without effect: {silent}"
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for _, leaf in flat)


@pytest.mark.parametrize("kind", few(["decoder", "encoder"], "decoder"))
def test_float16_computes_what_float32_does(make_model, tokens, kind):
    def gradient_of(dtype):
        graph, params = nnx.split(make_model(kind=kind, dtype=dtype))
        call = lambda params: nnx.merge(graph, params)(tokens)  # noqa: E731
        logits, pull = jax.vjp(jax.jit(call), params)
        return logits, jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(pull(jnp.sin(logits))[0])])

    for half, whole in zip(gradient_of("float16"), gradient_of("float32"), strict=True):
        assert half.dtype == jnp.float32
        # float16 keeps 11 bits, and a model of four blocks chains about 30 roundings.
        assert 0 < np.linalg.norm(half - whole) < 30 * 2**-11 * np.linalg.norm(whole)


def test_kinds(make_config):
    assert isinstance(odelm.create(make_config(), rngs=nnx.Rngs(0)), CausalLM)
    assert isinstance(odelm.create(make_config(kind="encoder"), rngs=nnx.Rngs(0)), MaskedLM)


def test_a_model_keeps_its_own_config(make_config):
    config = make_config()
    model = odelm.create(config, rngs=nnx.Rngs(0))
    assert model.config == config


@pytest.mark.parametrize(
    "options",
    [
        dict(kind="decoder", positions="learned"),
        dict(kind="encoder", positions="rotary", norm_placement="post"),
        dict(kind="encoder", positions="learned", token_types=2),
    ],
    ids=["decoder", "encoder", "types"],
)
def test_padding_changes_nothing(make_model, tokens, options):
    model = make_model(**options)
    graph, params = nnx.split(model)
    types = tokens % 2 if model.config.token_types else None
    padded = np.pad(tokens, ((0, 0), (0, 3)), constant_values=7)
    padded_types = None if types is None else np.pad(types, ((0, 0), (0, 3)))
    mask = np.arange(padded.shape[1]) < tokens.shape[1]
    run = jax.jit(lambda p, tokens, mask, types: nnx.merge(graph, p)(tokens, mask=mask, token_types=types, steps=2))
    expected = run(params, tokens, None, types)
    actual = run(params, padded, np.stack([mask, mask]), padded_types)[:, : tokens.shape[1]]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL)
    if model.config.kind == "encoder":
        unmasked = run(params, padded, np.ones_like(padded, bool), padded_types)[:, : tokens.shape[1]]
        assert np.abs(unmasked - expected).max() > 0.01, "an encoder without a mask attends to padding"


def test_token_types_matter(make_model, tokens):
    model = make_model(kind="encoder", positions="learned", token_types=2)
    zeros = compiled(model)(tokens, token_types=np.zeros_like(tokens), steps=1)
    np.testing.assert_allclose(zeros, compiled(model)(tokens, steps=1), rtol=0, atol=ATOL)
    assert np.abs(compiled(model)(tokens, token_types=np.ones_like(tokens), steps=1) - zeros).max() > 0.01


def test_steps_grid_and_plan_are_the_same_call(make_model, tokens):
    graph, params = nnx.split(make_model(groups=2))

    @jax.jit
    def run(params):
        model = nnx.merge(graph, params)
        calls = [dict(steps=2), dict(grid=[0, 2, 4]), dict(plan=model.plan(steps=2)), dict(grid=[0, 1, 2, 4]), {}]
        return [model(tokens, **call) for call in calls]

    steps, grid, plan, other, full = run(params)
    np.testing.assert_array_equal(steps, grid)
    np.testing.assert_array_equal(steps, plan)
    assert np.abs(steps - other).max() > 1e-3 and np.abs(steps - full).max() > 1e-3


def test_a_traced_grid_is_cut_into_equal_shares(make_model, tokens):
    graph, params = nnx.split(make_model(groups=2))
    run = jax.jit(lambda params, grid: nnx.merge(graph, params)(tokens, grid=grid))
    known = jax.jit(lambda params: nnx.merge(graph, params)(tokens, grid=[0, 0.5, 2, 3, 4]))
    np.testing.assert_allclose(run(params, jnp.array([0, 0.5, 2, 3, 4])), known(params), rtol=0, atol=ATOL)
    with pytest.raises(InputError, match="a traced grid has 3 steps.*2 groups; give a multiple of 2"):
        run(params, jnp.array([0, 1, 2, 4.0]))


def test_groups_cover_their_own_stretch_of_time(make_model, tokens):
    model = make_model(groups=2)
    h = model.embed(Inputs(tokens))
    for t in range(4):
        h = compiled(model.blocks[t // 2])(h, np.float32(t))
    np.testing.assert_allclose(compiled(model.encode)(tokens), model.final_norm(h), rtol=0, atol=ATOL)


def test_euler_of_a_post_norm_model_is_the_projected_step(make_model):
    model = make_model(norm_placement="post")
    h, block = jnp.ones((1, 3, 16)), model.blocks[0]
    (plan,) = model.plan(steps=2)
    end = jitted(lambda block: ode.follow(BlockField(block), h, plan)[0], block)
    for t in (0.0, 2.0):
        h = compiled(block.step)(block.condition(jnp.float32(t)), h, 2.0)[0]
    np.testing.assert_allclose(end, h, rtol=0, atol=ATOL)


@pytest.mark.parametrize("options", [dict(), dict(groups=2, norm_placement="post")], ids=["shared", "grouped"])
def test_one_trace_for_each_number_of_steps(make_model, tokens, options):
    graph, params = nnx.split(make_model(**options))
    traces = []

    @jax.jit
    def run(params, tokens, grid):
        traces.append(len(grid) - 1)
        return nnx.merge(graph, params)(tokens, grid=grid)

    for grid in ([0, 1, 2, 3, 4], [0, 0.5, 2, 2.5, 4], [0, 1.5, 2, 3.5, 4], [0, 2, 4], [0, 2, 4.0]):
        run(params, tokens, np.asarray(grid, np.float32)).block_until_ready()
    assert traces == [4, 2]


@pytest.mark.thorough
def test_adaptive_steps_approach_the_fine_grid(make_model, tokens):
    graph, params = nnx.split(make_model(groups=2))
    hidden, evaluations = jax.jit(lambda p: nnx.merge(graph, p).encode_adaptive(tokens, tolerance=1e-4))(params)
    fine = jax.jit(lambda p: nnx.merge(graph, p).encode(tokens, steps=64, solver="rk4"))(params)
    # Fewer than 50 steps each off by the tolerance of a state of order one.
    assert np.abs(hidden - fine).max() < 50 * 1e-4
    assert evaluations.dtype == jnp.int32 and 6 < int(evaluations) < 500


@pytest.mark.parametrize("ends", [thorough(dict()), dict(depth=6, prelude=1, coda=1)])
def test_classifier(make_model, make_config, tokens, ends):
    encoder = nnx.clone(make_model(kind="encoder", **ends))
    model = Classifier.from_encoder(encoder, outputs=3, rngs=nnx.Rngs(1))
    outputs = compiled(model)(tokens, steps=2)
    assert (outputs.shape, outputs.dtype) == ((2, 3), jnp.float32)
    np.testing.assert_array_equal(compiled(model.encode)(tokens, steps=2), compiled(encoder.encode)(tokens, steps=2))

    mine = {id(leaf) for leaf in jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable))}
    its = {id(leaf) for leaf in jax.tree.leaves(nnx.state(encoder), is_leaf=lambda x: isinstance(x, nnx.Variable))}
    assert not mine & its
    encoder.embed.tokens[...] = jnp.zeros_like(encoder.embed.tokens[...])
    np.testing.assert_array_equal(compiled(model)(tokens, steps=2), outputs)

    alone = Classifier(make_config(kind="encoder"), outputs=1, rngs=nnx.Rngs(0))
    assert jax.eval_shape(lambda: alone(tokens, steps=1)).shape == (2, 1)


def test_sentence_order_head(make_model, tokens):
    model = make_model(kind="encoder", sentence_order=True, token_types=2)
    order = model.readout_order(compiled(model.encode)(tokens, steps=1))
    assert (order.shape, order.dtype) == ((2, 2), jnp.float32)
    with pytest.raises(InputError, match="no sentence-order head.*model.sentence_order=True"):
        make_model(kind="encoder").readout_order(np.zeros((2, 6, 16)))


@pytest.mark.parametrize(
    "options, call, message",
    [
        ({}, dict(steps=2, grid=[0, 4]), "both steps=2 and a grid were given"),
        ({}, dict(steps=0), "steps is 0"),
        (dict(groups=2), dict(steps=3), "steps is 3, .* 2 groups; try (2|4)"),
        (dict(groups=2), dict(grid=[0, 1, 4]), "lacks 2, a boundary"),
        ({}, dict(grid=[0, 3, 1, 4]), r"grid\[2\] is 1, not above"),
        ({}, dict(solver="hune"), "did you mean 'heun'"),
        ({}, dict(solver="implicit_euler"), "not an explicit Runge-Kutta method.*integrator='diffrax'"),
        ({}, dict(token_types=np.zeros((2, 6), np.int32)), "token_types were given, but model.token_types is 0"),
    ],
)
def test_a_bad_call_is_named(make_model, tokens, options, call, message):
    with pytest.raises(InputError, match=message):
        make_model(**options)(tokens, **call)


def test_too_long_tokens_are_named(make_model):
    with pytest.raises(InputError, match="the tokens are 17 long, but model.max_length is 16"):
        make_model()(np.zeros((1, 17), np.int32))


@pytest.mark.parametrize("cls, kind", [(CausalLM, "encoder"), (MaskedLM, "decoder")])
def test_the_wrong_kind_is_named(make_config, cls, kind):
    with pytest.raises(InputError, match=f"{cls.__name__} needs model.kind=.*config says '{kind}'"):
        cls(make_config(kind=kind), rngs=nnx.Rngs(0))


def test_classifier_mistakes_are_named(make_config):
    with pytest.raises(InputError, match="Classifier needs model.kind='encoder'"):
        Classifier(make_config(), outputs=2, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="outputs is 0"):
        Classifier(make_config(kind="encoder"), outputs=0, rngs=nnx.Rngs(0))


def test_a_bad_config_is_refused_at_creation(make_config):
    with pytest.raises(InputError, match="model.heads is 3"):
        odelm.create(dataclasses.replace(make_config(), heads=3), rngs=nnx.Rngs(0))

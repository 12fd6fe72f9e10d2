"""What a call may be given: tokens or embeddings, positions, and every way in which they do not fit."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from flax import nnx

import odelm
from odelm.errors import InputError
from odelm.models import Inputs
from odelm.models.parameters import parameters
from tests.calls import compiled, jitted
from tests.thorough import few

ATOL = 3 * 200 * 6e-8
ZEROS = np.zeros((1, 2), np.int32)


@pytest.mark.parametrize("options", [dict(positions="learned"), dict(embed_dim=8, embed_norm=True, token_types=2)])
def test_embeddings_enter_in_place_of_tokens(make_model, tokens, options):
    model = make_model(**options)
    rows = model.embed.tokens[...][tokens]
    np.testing.assert_allclose(compiled(model)(Inputs(embeddings=rows)), compiled(model)(tokens), rtol=0, atol=ATOL)
    mask = np.array([[1, 1, 1, 1, 0, 0], [1] * 6], bool)
    np.testing.assert_allclose(
        compiled(model.encode)(Inputs(embeddings=rows, mask=mask), steps=2),
        compiled(model.encode)(tokens, mask=mask, steps=2),
        atol=ATOL,
    )


def test_gradients_reach_embeddings(make_model, tokens):
    model = make_model()
    gradient = jax.jit(jax.grad(lambda x: jnp.square(model(Inputs(embeddings=x), steps=1)).mean()))
    assert np.any(gradient(jnp.asarray(model.embed.tokens[...][tokens])))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_positions_may_be_given(make_model, tokens, positions):
    model = make_model(positions=positions)
    counted = np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape)
    run = compiled(model)
    np.testing.assert_allclose(run(Inputs(tokens, positions=counted)), run(tokens), rtol=0, atol=ATOL)
    spread = run(Inputs(tokens, positions=2 * counted))
    assert np.abs(spread - run(tokens)).max() > 1e-3


def test_an_inputs_and_arguments_are_the_same_call(make_model, tokens):
    model = make_model(kind="encoder", token_types=2)
    mask, types = np.ones_like(tokens, bool), tokens % 2
    segments = np.array([[0, 0, 1, 1, 1, 1], [0] * 6], np.int32)
    one = compiled(model)(Inputs(tokens, mask=mask, token_types=types, segments=segments), steps=1)
    other = compiled(model)(tokens, mask=mask, token_types=types, segments=segments, steps=1)
    np.testing.assert_array_equal(one, other)
    with pytest.raises(InputError, match="put them into it"):
        model(Inputs(tokens), mask=mask)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(), "give either tokens or embeddings"),
        (dict(tokens=np.zeros((1, 2), np.int32), embeddings=np.zeros((1, 2, 16), np.float32)), "and not both"),
        (dict(tokens=np.zeros((2,), np.int32)), r"the tokens are int32 of shape \(2,\), expected whole numbers"),
        (dict(tokens=np.zeros((1, 2), np.float32)), r"the tokens are float32 of shape \(1, 2\).*embeddings=..."),
        (dict(embeddings=np.zeros((1, 2, 8), np.float32)), r"the embeddings are float32 of shape \(1, 2, 8\).*16"),
        (dict(embeddings=np.zeros((1, 2, 16), np.int32)), "the embeddings are int32"),
        (dict(tokens=np.zeros((1, 2), np.int32), mask=np.ones((2,), bool)), r"the mask are of shape \(2,\)"),
        (dict(tokens=np.zeros((1, 2), np.int32), positions=np.ones((1, 3), np.int32)), r"the positions .* \(1, 3\)"),
        (dict(tokens=ZEROS, mask=np.ones((1, 2), bool), lengths=np.array([2])), "either a mask or lengths"),
        (dict(tokens=ZEROS, lengths=np.array([2, 2])), r"the lengths are of shape \(2,\), expected one for each row"),
        (dict(tokens=ZEROS, lengths=np.array([3])), "the lengths have 3 in row 0, expected 0 to 2: a row cannot be"),
        (dict(tokens=ZEROS, lengths=np.array([1.0])), "the lengths are float64, expected whole numbers"),
        (dict(tokens=np.array([[0, 1], [12, 13]])), "the tokens have 13 in row 1 at place 1, expected 0 to 12"),
        (dict(tokens=jnp.array([[-1, 0]])), "the tokens have -1 in row 0 at place 0, expected 0 to 12"),
        (dict(tokens=ZEROS, positions=np.array([[0, 16]])), "the positions have 16 in row 0 at place 1.* 0 to 15"),
        (dict(tokens=ZEROS, positions=np.zeros((1, 2))), "the positions are float64, expected whole numbers"),
        (dict(tokens=ZEROS, token_types=np.array([[0, 2]])), "the token_types have 2 .* expected 0 to 1"),
        (dict(tokens=ZEROS, token_types=np.zeros((1, 2), bool)), "the token_types are bool"),
        (dict(tokens=ZEROS, segments=np.zeros((1, 2))), "the segments are float64"),
        (dict(tokens=ZEROS, mask=np.zeros((1, 2))), "the mask is float64, expected bool.*nothing that is added"),
        (dict(tokens=ZEROS, mask=np.array([[0, -9999]])), "the mask is int64, expected bool, or whole numbers 0 and 1"),
        (dict(tokens=[[1, 2], [3]]), "the tokens are rows of different lengths: pad them"),
        (dict(tokens="text"), "the tokens are str, expected an array or lists of numbers"),
    ],
)
def test_what_does_not_fit_is_named(make_model, inputs, message):
    with pytest.raises(InputError, match=message):
        make_model(kind="encoder", token_types=2, positions="learned")(Inputs(**inputs))


def test_lists_and_masks_of_whole_numbers_are_taken(make_model, tokens):
    model = make_model(kind="encoder")
    mask = np.array([[1, 1, 1, 1, 0, 0], [1] * 6])
    expected = model(tokens, mask=mask.astype(bool))
    for given in (mask, mask.astype(np.uint8), jnp.asarray(mask), mask.tolist()):
        np.testing.assert_array_equal(model(tokens.tolist(), mask=given), expected)
    graph, params = nnx.split(model)
    traced = jax.jit(lambda params, mask: nnx.merge(graph, params)(tokens, mask=mask))(params, mask)
    np.testing.assert_allclose(traced, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["tokens", "token_types", "positions"])
def test_an_id_without_an_embedding_is_nan_in_traced_code(make_model, tokens, name):
    """As in `nnx.Embed`; its row alone, and never a neighbour's embedding."""
    graph, params = nnx.split(make_model(kind="encoder", token_types=2, positions="learned"))
    run = jax.jit(lambda params, inputs: nnx.merge(graph, params)(inputs))
    given = dict(tokens=tokens, token_types=tokens % 2, positions=np.tile(np.arange(6, dtype=np.int32), (2, 1)))
    assert np.isfinite(run(params, Inputs(**given))).all()
    for wrong in (-1, 16):
        changed = given[name].copy()
        changed[1, 2] = wrong
        logits = run(params, Inputs(**given | {name: changed}))
        assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()


@pytest.mark.parametrize("steps", [np.int64(2), jnp.int32(2), np.array(2)])
def test_steps_may_be_a_number_of_any_kind(make_model, tokens, steps):
    given, expected = (
        jitted(lambda model, count=count: model(tokens, steps=count), make_model()) for count in (steps, 2)
    )
    np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize("steps", [0, -1, 2.0, "2", np.array([2])])
def test_steps_that_are_no_count_are_named(make_model, tokens, steps):
    with pytest.raises(InputError, match="steps is .*, expected a whole number of at least 1"):
        make_model()(tokens, steps=steps)
    with pytest.raises(InputError, match="steps is .*known when the code is traced"):
        jax.jit(lambda steps: make_model()(tokens, steps=steps))(2)


TABULATED = {
    "decoder": dict(),
    "encoder": dict(kind="encoder", norm_placement="post", positions="learned", token_types=2),
    "groups": dict(groups=2, layer_rank=2, activation="swiglu"),
    "ends": dict(depth=6, prelude=1, coda=1, embed_dim=8, bias=True),
    "chain": dict(inner_blocks=2),
    "lanes": dict(lanes=2, wide_modulation=True),
}


@pytest.mark.parametrize("options", few(TABULATED, "encoder", "ends"))
def test_a_model_is_tabulated(make_model, tokens, options):
    model = make_model(**options)
    before = compiled(model)(tokens)
    table = nnx.tabulate(model, tokens, mask=np.ones_like(tokens), console_kwargs=dict(width=200))
    assert type(model).__name__ in table and "SharedBlock" in table and "Attention" in table
    np.testing.assert_array_equal(compiled(model)(tokens), before)


POST = dict(norm_placement="post", groups=2, depth=6, prelude=1, coda=1)
CROSSED = {
    f"{name}, {solver if isinstance(solver, str) else 'Tsit5'}": (options, solver)
    for name, options in {"pre": dict(), "post": POST}.items()
    for solver in ("euler", "heun", diffrax.Tsit5())
}


@pytest.mark.parametrize("options, solver", few(CROSSED, "pre, heun", "post, euler"))
def test_diffrax_crosses_a_model_as_the_scan_does(make_model, tokens, options, solver):
    graph, params = nnx.split(make_model(**options))
    plan = compiled(make_model(**options).plan)
    plans = [plan(steps=2, solver=solver, integrator=name) for name in ("scan", "diffrax")]
    assert [sum(p.evaluations for p in plan) for plan in plans][0] == sum(p.evaluations for p in plans[1])
    run = jax.jit(lambda params, plan: nnx.merge(graph, params)(tokens, plan=plan))
    scan, walked = (run(params, plan) for plan in plans)
    # Twelve blocks at most, in another order: see ATOL; increments of a stiff field are some ten times the state.
    np.testing.assert_allclose(walked, scan, rtol=0, atol=10 * ATOL)


NEWTON = optx.Newton(rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("solver", ["implicit_euler", "kvaerno3", diffrax.Kvaerno3(root_finder=NEWTON)])
def test_an_implicit_solver_crosses_a_model(make_model, tokens, solver):
    graph, params = nnx.split(make_model())
    run = jax.jit(lambda params, plan: nnx.merge(graph, params)(tokens, plan=plan))
    fine = run(params, compiled(make_model().plan)(steps=64, solver="rk4"))

    def error(steps: int) -> float:
        plan = make_model().plan(steps=steps, solver=solver, integrator="diffrax")
        return float(np.abs(run(params, plan) - fine).max())

    coarse = error(16)
    assert coarse < 0.5 and error(32) < 0.6 * coarse, "a method of order one halves its error with its steps"


def test_an_unknown_integrator_and_a_solver_without_tolerances_are_named(make_model, tokens):
    with pytest.raises(InputError, match="integrator is 'difrax'; did you mean 'diffrax'"):
        make_model().plan(integrator="difrax")
    plan = make_model().plan(steps=2, solver=diffrax.Kvaerno3(), integrator="diffrax")
    with pytest.raises(InputError, match="Kvaerno3 takes the tolerance of its root finder.*Newton"):
        make_model()(tokens, plan=plan)


def test_a_plan_of_the_scan_holds_no_object_of_diffrax(make_model):
    plan = make_model(groups=2).plan(steps=4, solver="tsit5")
    assert "diffrax" not in str(jax.tree.structure(plan)).lower()
    assert hash(jax.tree.structure(plan)) == hash(
        jax.tree.structure(make_model(groups=2).plan(steps=4, solver="tsit5"))
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(bias=True, layer_rank=2),
        dict(kind="encoder", norm="layernorm", norm_placement="post", embed_norm=True, positions="learned", bias=True,
             token_types=2, sentence_order=True, embed_dim=8),
    ],
)  # fmt: skip
def test_parameters_and_logits_are_float32_with_64_bits_on_too(x64, make_config, tokens, options):
    model = odelm.create(make_config(**options), rngs=nnx.Rngs(0))
    assert {array.dtype for array in parameters(model).values()} == {jnp.dtype("float32")}
    assert compiled(model)(tokens).dtype == jnp.float32

"""Early exits: what a row or a token computes that leaves the fine steps, and when it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm.errors import InputError
from odelm.models import Classifier, Encoder, Inputs
from odelm.models.early_exit import EarlyExit, counts_that_save
from odelm.models.exit_pass import decode_with_exits, encode_with_exits
from odelm.models.stretches import evaluations_of
from tests.calls import compiled, jitted
from tests.thorough import few

ATOL = 3 * 200 * 6e-8
ROWS = np.random.default_rng(0).integers(0, 13, (4, 9)).astype(np.int32)
LENGTHS = np.array([9, 3, 6, 1], np.int32)
POST = dict(kind="encoder", norm_placement="post", positions="learned")
MODELS = {
    "pre": dict(depth=8),
    "post": dict(depth=8, norm_placement="post", groups=2),
    "ends": dict(depth=8, prelude=1, coda=1, positions="learned", layer_rank=2),
    "chain": dict(depth=6, inner_blocks=2, wide_modulation=True),
    "lanes": dict(depth=6, lanes=2),
    "encoder": dict(depth=6, **POST),
}


def left(model, inputs, tolerance, *, measure="state", **options):
    """Returns the states and the evaluations of a pass in unit steps."""
    rule = EarlyExit(tolerance, measure)
    return jitted(lambda model: encode_with_exits(model, inputs, model.plan(), rule, **options), model)


def some_leave(model, inputs, *, measure="state", **options):
    """Returns the smallest of some tolerances at which rows, or tokens, leave at different steps; states and counts."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, rule):
        model = nnx.merge(graph, state)
        return encode_with_exits(model, inputs, model.plan(), rule, **options)

    for tolerance in np.geomspace(1e-3, 3, 40):
        rule = EarlyExit(float(tolerance), measure)
        states, counts = run(state, rule)
        if len(set(np.asarray(counts)[:, -5:].flat if counts.ndim == 2 else counts.tolist())) > 1:
            return rule, states, np.asarray(counts)
    raise AssertionError("all leave together")


@pytest.mark.parametrize("by", ["row", "token"])
@pytest.mark.parametrize("options", few(MODELS, "post", "ends", "encoder"))
def test_nothing_leaves_that_has_not_settled(options, by, make_model):
    model = make_model(**options)
    inputs = Inputs(ROWS, lengths=LENGTHS)
    states, evaluations = left(model, inputs, 1e-9, by=by)
    assert (np.asarray(evaluations) == model.config.depth).all()
    real = np.arange(9) < LENGTHS[:, None]
    np.testing.assert_allclose(states[real], compiled(model.encode)(inputs)[real], rtol=0, atol=ATOL)


ONE_STRETCH = {name: options for name, options in MODELS.items() if name not in ("post", "ends")}


@pytest.mark.parametrize("options", few(ONE_STRETCH, "pre", "encoder"))
def test_what_has_settled_takes_two_steps_and_the_rest(options, make_model):
    """With any tolerance every row leaves after its second step, so that the pass is one over a known grid."""
    model = make_model(**options)
    states, evaluations = left(model, Inputs(ROWS), 1e9)
    assert (np.asarray(evaluations) == 3).all()
    expected = compiled(model.encode)(ROWS, grid=[0, 1, 2, model.config.depth])
    np.testing.assert_allclose(states, expected, rtol=0, atol=ATOL)
    _, by_token = left(model, Inputs(ROWS), 1e9, by="token")
    assert by_token.shape == ROWS.shape and (np.asarray(by_token) == 3).all()


def test_groups_and_ends_are_crossed_each_by_itself(make_model):
    model = make_model(depth=10, groups=2, prelude=1, coda=1)
    states, evaluations = left(model, Inputs(ROWS), 1e9)
    assert (np.asarray(evaluations) == 1 + 3 + 3 + 1).all()
    expected = compiled(model.encode)(ROWS, grid=[0, 1, 2, 4, 5, 6, 8])
    np.testing.assert_allclose(states, expected, rtol=0, atol=ATOL)


def test_a_row_leaves_by_eulers_estimate_of_its_last_step(make_model):
    """The score is computed here from the states along an uneven grid, and the tolerances lie just beside it."""
    model, grid = make_model(depth=6), np.array([0, 0.5, 1.5, 3, 4, 5.5, 6])
    states = [jnp.asarray(compiled(model.embed)(Inputs(ROWS)))]
    field = odelm.models.BlockField(model.blocks[0])
    for before, after in zip(grid, grid[1:], strict=False):
        states.append(odelm.integrate(field, states[-1], [before, after]))
    sizes, middles = np.diff(grid), (grid[1:] + grid[:-1]) / 2
    slopes = [(after - before) / h for before, after, h in zip(states, states[1:], sizes, strict=False)]

    def score(n: int) -> np.ndarray:
        """Returns that of each row after so many steps: T - t in place of h in h² / 2 |d²h / dt²|."""
        second = (slopes[n - 1] - slopes[n - 2]) / (middles[n - 1] - middles[n - 2])
        error = (6 - grid[n]) ** 2 / 2 * second
        return np.sqrt(np.square(error).mean((1, 2)) / np.square(states[n]).mean((1, 2)))

    first = score(2)
    assert len(set(first.round(4))) == 4, "rows differ"
    for tolerance in (np.sort(first)[1] * (1 - 1e-4), np.sort(first)[1] * (1 + 1e-4)):
        rule = EarlyExit(float(tolerance))
        _, evaluations = jitted(lambda m, rule=rule: encode_with_exits(m, Inputs(ROWS), m.plan(grid=grid), rule), model)
        expected = [next((n + 1 for n in range(2, 6) if score(n)[row] <= tolerance), 6) for row in range(4)]
        assert np.asarray(evaluations).tolist() == expected and 3 in expected


def test_a_row_leaves_when_its_prediction_has_settled(make_model):
    model = make_model(depth=6)
    graph, state = nnx.split(model)
    probabilities, h = [], compiled(model.embed)(Inputs(ROWS))
    field = odelm.models.BlockField(model.blocks[0])
    for t in range(6):
        h = odelm.integrate(field, h, [float(t), t + 1.0])
        probabilities.append(jax.nn.softmax(model.readout(model._end(h))))
    changes = [np.abs(b - a).sum(-1).mean(1) / 2 for a, b in zip(probabilities, probabilities[1:], strict=False)]
    tolerance = float(np.sort(changes[0])[1] * (1 + 1e-4))
    _, evaluations = left(model, Inputs(ROWS), tolerance, measure="prediction")
    expected = [next((n + 3 for n in range(4) if changes[n][row] <= tolerance), 6) for row in range(4)]
    assert np.asarray(evaluations).tolist() == expected and 3 in expected


def test_padding_does_not_decide(make_model):
    model = make_model(depth=6, kind="encoder")
    longer = np.concatenate([ROWS, np.full_like(ROWS, 12)], axis=1)[:, :16]
    for measure in ("state", "prediction"):
        rule, short, counts = some_leave(model, Inputs(ROWS, lengths=LENGTHS), measure=measure)
        padded, same = left(model, Inputs(longer, lengths=LENGTHS), rule.tolerance, measure=measure)
        assert counts.tolist() == np.asarray(same).tolist()
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(short[row, :length], padded[row, :length], rtol=0, atol=ATOL)


@pytest.mark.parametrize("options", few({k: v for k, v in MODELS.items() if v != MODELS["encoder"]}, "post"))
def test_tokens_with_a_memory_are_those_without_one(options, make_model):
    """The first four positions cross the depth in all steps, as a prompt does; those after them come one by one."""
    model = make_model(**options)
    plan = model.plan()
    fine = np.broadcast_to(np.arange(9) < 4, ROWS.shape)
    rule, states, counts = some_leave(model, Inputs(ROWS), by="token", fine=fine)
    assert (counts[:, :4] == model.config.depth).all()
    graph, state = nnx.split(model)

    @jax.jit
    def step(state, tokens, memory):
        return decode_with_exits(nnx.merge(graph, state), Inputs(tokens), plan, rule, memory)

    hidden, memory = jitted(
        lambda model: model.run(Inputs(ROWS[:, :4]), plan, memory=model.memory(plan, batch=4, room=9)), model
    )
    np.testing.assert_allclose(hidden, states[:, :4], rtol=0, atol=ATOL)
    for place in range(4, 9):
        hidden, spent, memory = step(state, ROWS[:, place : place + 1], memory)
        np.testing.assert_allclose(hidden[:, 0], states[:, place], rtol=0, atol=ATOL)
        assert np.asarray(spent).tolist() == counts[:, place].tolist()


def test_what_is_done_costs_no_more_steps(make_model):
    """The loop over the depth ends with the last row, also where no row takes all steps."""
    model = make_model(depth=8)
    calls = []
    block = model.blocks[0]
    step = type(block).step

    def counted(self, **options):
        jax.debug.callback(lambda: calls.append(1))
        return step(self, **options)

    type(block).step = counted
    try:
        left(model, Inputs(ROWS), 1e9)
        jax.effects_barrier()
    finally:
        type(block).step = step
    assert len(calls) == 3


@pytest.mark.parametrize("by", ["row", "token"])
def test_no_dtype_is_promoted(by, make_model):
    model = make_model(depth=5, dtype="bfloat16")
    with jax.numpy_dtype_promotion("strict"):
        _, evaluations = left(model, Inputs(ROWS), 1e9, by=by)
    assert (np.asarray(evaluations) == 3).all()


def test_rows_that_are_done_are_waited_for_by_none(make_model):
    model = make_model(depth=6)
    plan = model.plan()

    def decoded(model, tolerance, done):
        _, memory = model.run(Inputs(ROWS[:, :4]), plan, memory=model.memory(plan, batch=4, room=5))
        hidden, spent, _ = decode_with_exits(model, Inputs(ROWS[:, 4:5]), plan, EarlyExit(tolerance), memory, done)
        return hidden, spent

    done = np.array([True, False, False, True])
    hidden, spent = jitted(lambda model: decoded(model, 1e-9, done), model)
    assert np.asarray(spent).tolist() == [0, 6, 6, 0]
    others, _ = jitted(lambda model: decoded(model, 1e-9, None), model)
    np.testing.assert_allclose(hidden[1:3], others[1:3], rtol=0, atol=ATOL)


def test_only_one_token_of_a_row_is_decoded_and_only_where_there_is_room(make_model):
    model, rule = make_model(), EarlyExit(0.1)
    plan = model.plan()
    memory = model.memory(plan, batch=4, room=4)
    with pytest.raises(InputError, match="2 tokens of each row are given, expected one"):
        decode_with_exits(model, Inputs(ROWS[:, :2]), plan, rule, memory)
    _, memory = model.run(Inputs(ROWS[:, :4]), plan, memory=memory)
    with pytest.raises(InputError, match="make it with more room"):
        decode_with_exits(model, Inputs(ROWS[:, 4:5]), plan, rule, memory)


def test_mistakes_are_told(make_model):
    model = make_model()
    with pytest.raises(InputError, match="tolerance is -1.0, expected a number above 0"):
        EarlyExit(np.float32(-1))
    with pytest.raises(InputError, match="tolerance is 'a', expected a number above 0, such as 0.1"):
        EarlyExit("a")
    with pytest.raises(InputError, match="tolerance is None, expected a number above 0"):
        odelm.Generator(model, early_exit=EarlyExit(None))
    with pytest.raises(InputError, match="fine marks tokens, but rows leave as a whole"):
        encode_with_exits(model, Inputs(ROWS), model.plan(), EarlyExit(0.1), fine=np.ones(ROWS.shape, bool))
    regression = Classifier.from_encoder(make_model(kind="encoder"), outputs=1, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="a regression predicts no probabilities"):
        encode_with_exits(regression, Inputs(ROWS), regression.plan(), EarlyExit(0.1, "prediction"))
    with pytest.raises(InputError, match=r"early_exit is 0.1, expected odelm.EarlyExit"):
        odelm.Generator(model, early_exit=0.1)
    with pytest.raises(InputError, match="tolerance is 0, expected a number above 0"):
        EarlyExit(0)
    with pytest.raises(InputError, match="measure of early exits is 'states'.*state"):
        EarlyExit(0.1, "states")
    with pytest.raises(InputError, match="by 'rows'.*row"):
        encode_with_exits(model, Inputs(ROWS), model.plan(), EarlyExit(0.1), by="rows")
    with pytest.raises(InputError, match="steps of Euler's method"):
        encode_with_exits(model, Inputs(ROWS), model.plan(solver="heun"), EarlyExit(0.1))
    encoder = Encoder(make_model(kind="encoder").config, pooled=False, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="makes some, not Encoder: measure the state"):
        encode_with_exits(encoder, Inputs(ROWS), encoder.plan(), EarlyExit(0.1, "prediction"))
    assert counts_that_save(model.config, [4, 3]) == [4]
    with pytest.raises(InputError, match="fewer than 4 steps"):
        counts_that_save(model.config, [3, 2])
    assert evaluations_of(model.plan()) == 4

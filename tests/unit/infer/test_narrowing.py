"""Rows that leave the depth early are left out of later steps, and are computed as they would be together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from odelm.errors import InputError
from odelm.infer.encoder_runner import EncoderRunner
from odelm.infer.narrowing import encode_narrowing
from odelm.models import Classifier, Inputs
from odelm.models.early_exit import EarlyExit
from odelm.models.exit_pass import encode_with_exits
from tests.calls import jitted
from tests.thorough import few
from tests.unit.models.test_early_exit import ATOL, MODELS, some_leave

ROWS = np.random.default_rng(1).integers(0, 13, (7, 9)).astype(np.int32)
LENGTHS = np.array([9, 3, 6, 1, 9, 2, 7], np.int32)


@pytest.mark.parametrize("measure", few(["state", "prediction"], "prediction"))
@pytest.mark.parametrize("options", few(MODELS, "post", "encoder"))
def test_rows_of_a_narrowing_batch_are_those_of_a_pass(options, measure, make_model):
    model, inputs = make_model(**options), Inputs(ROWS, lengths=LENGTHS)
    rule, expected, counts = some_leave(model, inputs, measure=measure)
    states, same = jitted(lambda model: encode_narrowing(model, inputs, model.plan(), rule, parts=3), model)
    assert np.asarray(same).tolist() == np.asarray(counts).tolist()
    real = np.arange(9) < LENGTHS[:, None]
    np.testing.assert_allclose(states[real], expected[real], rtol=0, atol=ATOL)


@pytest.mark.parametrize("parts", [1, 2, 7, 20])
def test_any_number_of_parts_will_do(parts, make_model):
    model, rng = make_model(depth=8), np.random.default_rng(2)
    inputs = Inputs(ROWS, segments=np.sort(rng.integers(0, 4, ROWS.shape), axis=1).astype(np.int32))
    rule, expected, counts = some_leave(model, inputs)
    states, same = jitted(lambda model: encode_narrowing(model, inputs, model.plan(), rule, parts=parts), model)
    assert np.asarray(same).tolist() == np.asarray(counts).tolist()
    np.testing.assert_allclose(states, expected, rtol=0, atol=ATOL)


def test_rows_leave_where_they_do_in_a_pass_at_every_tolerance(make_model):
    graph, params = nnx.split(make_model(depth=12))
    padding = np.array(params["embed"]["tokens"][...])
    padding[0] *= 100  # settles the rows that it is in: the longest, and by mistake those that it fills up
    params["embed"]["tokens"] = params["embed"]["tokens"].replace(jnp.asarray(padding))
    rows = np.where(np.arange(9) < LENGTHS[:, None], np.maximum(ROWS, 1), 0)
    rows[LENGTHS == 9, :5] = 0
    inputs = Inputs(rows, lengths=LENGTHS)

    @jax.jit
    def both(params, rule):
        model = nnx.merge(graph, params)
        plan = model.plan()
        return encode_with_exits(model, inputs, plan, rule), encode_narrowing(model, inputs, plan, rule, parts=7)

    seen, real = set(), np.arange(9) < LENGTHS[:, None]
    for tolerance in np.geomspace(0.02, 3, 60):
        (expected, counts), (found, same) = both(params, EarlyExit(float(tolerance)))
        np.testing.assert_array_equal(same, counts)
        np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=ATOL)
        seen.add(len(set(np.asarray(counts).tolist())))
    assert max(seen) > 3, "they leave at different steps"


@pytest.mark.parametrize(("rows", "steps"), [(1, 8), (1, 2), (7, 1), (7, 4)])
def test_a_row_alone_and_few_steps(rows, steps, make_model):
    model, inputs, rule = make_model(depth=8), Inputs(ROWS[:rows]), EarlyExit(0.5)

    def both(model):
        plan = model.plan(steps=steps)
        return encode_with_exits(model, inputs, plan, rule), encode_narrowing(model, inputs, plan, rule)

    (expected, counts), (found, same) = jitted(both, model)
    assert np.asarray(same).tolist() == np.asarray(counts).tolist()
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("parts", "tolerance", "expected"),
    [
        (1, 0.7, [5, 5, 6, 6, 6, 6, 6]),
        (3, 0.7, [5, 5, 6, 6, 6, 6, 6]),
        (7, 0.7, [5, 5, 6, 6, 6, 6, 6]),
        (7, 1e9, [3] * 7),
    ],
)
def test_a_step_is_taken_for_the_parts_that_are_left(parts, tolerance, expected, make_model, monkeypatch):
    model, taken = make_model(depth=8), []
    block = type(model.blocks[0])
    step = block.step

    def counted(self, *, h, **options):
        jax.debug.callback(lambda: taken.append(len(h)))
        return step(self, h=h, **options)

    rule = EarlyExit(tolerance)
    counts = jitted(lambda model: encode_narrowing(model, Inputs(ROWS), model.plan(), rule, parts=1), model)[1]
    assert sorted(np.asarray(counts).tolist()) == expected
    monkeypatch.setattr(block, "step", counted)
    jitted(lambda model: encode_narrowing(model, Inputs(ROWS), model.plan(), rule, parts=parts), model)
    jax.effects_barrier()
    widths = [-(-7 * n // parts) for n in range(1, parts + 1)]
    left = [int((np.asarray(counts) >= number).sum()) for number in range(1, int(max(counts)) + 1)]
    assert sorted(taken, reverse=True) == [min(width for width in widths if width >= rows) for rows in left]


@pytest.mark.thorough
def test_texts_are_embedded_in_a_narrowing_batch(make_model):
    model = make_model(**MODELS["encoder"])
    rule, *_ = some_leave(model, Inputs(ROWS, lengths=LENGTHS))
    texts = [row[:length].tolist() for row, length in zip(ROWS, LENGTHS, strict=True)]
    found = EncoderRunner(model, early_exit=rule).embed(texts, pooling="none")
    plain = EncoderRunner(model).embed(texts, pooling="none")
    for ids, one in zip(texts, found, strict=True):
        alone, _ = encode_with_exits(model, Inputs(np.array([ids], np.int32)), model.plan(), rule)
        np.testing.assert_allclose(one, alone[0], rtol=0, atol=ATOL)
    assert max(np.abs(one - other).max() for one, other in zip(found, plain, strict=True)) > 1e-3, "some left early"


def test_a_classifier_leaves_by_its_class(make_model):
    encoder = make_model(**MODELS["encoder"])
    model = Classifier.from_encoder(encoder, outputs=3, rngs=nnx.Rngs(0))
    inputs = Inputs(ROWS, lengths=LENGTHS)
    rule, _, counts = some_leave(model, inputs, measure="prediction")
    _, same = jitted(lambda model: encode_narrowing(model, inputs, model.plan(), rule, parts=2), model)
    assert np.asarray(same).tolist() == counts.tolist()


def test_mistakes_are_told(make_model):
    model = make_model()
    with pytest.raises(InputError, match="parts is 0, expected 1 or more"):
        encode_narrowing(model, Inputs(ROWS), model.plan(), EarlyExit(0.1), parts=0)

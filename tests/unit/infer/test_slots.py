"""Rows that leave the depth early make room for others, and are computed as they would be together."""

import jax
import numpy as np
import pytest
from flax import nnx

from odelm.errors import InputError
from odelm.infer.encoder_runner import EncoderRunner
from odelm.infer.slots import ASKED_AFTER, encode_in_slots, slots_for
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
def test_rows_in_slots_are_those_of_a_pass(options, measure, make_model):
    model, inputs = make_model(**options), Inputs(ROWS, lengths=LENGTHS)
    rule, expected, counts = some_leave(model, inputs, measure=measure)
    states, same = jitted(lambda model: encode_in_slots(model, inputs, model.plan(), rule, slots=3), model)
    assert np.asarray(same).tolist() == np.asarray(counts).tolist()
    real = np.arange(9) < LENGTHS[:, None]
    np.testing.assert_allclose(states[real], expected[real], rtol=0, atol=ATOL)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("slots", [1, 7, 20])
def test_any_number_of_slots_will_do(slots, backend, make_model, monkeypatch):
    model, rule = make_model(depth=8, dtype="float32"), EarlyExit(0.1)
    segments = np.repeat([[0, 0, 0, 1, 1, 1, 1, 2, 2]], 7, axis=0)
    inputs = Inputs(ROWS, segments=segments)
    expected, counts = jitted(lambda model: encode_with_exits(model, inputs, model.plan(), rule), model)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    states, same = jitted(lambda model: encode_in_slots(model, inputs, model.plan(), rule, slots=slots), model)
    assert np.asarray(same).tolist() == np.asarray(counts).tolist()
    np.testing.assert_allclose(states, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("backend", "more"), [("cpu", 0), ("gpu", ASKED_AFTER - 1)])
def test_a_step_of_all_slots_is_taken_for_each_of_them(backend, more, make_model, monkeypatch):
    """So many steps as the rows take evaluations in all, shared out over the slots, and those of a last row alone."""
    model, calls = make_model(depth=8), []
    block = type(model.blocks[0])
    step = block.step

    def counted(self, **options):
        jax.debug.callback(lambda: calls.append(1))
        return step(self, **options)

    monkeypatch.setattr(block, "step", counted)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    _, counts = jitted(lambda model: encode_in_slots(model, Inputs(ROWS), model.plan(), EarlyExit(0.5), slots=2), model)
    jax.effects_barrier()
    total = int(np.asarray(counts).sum())
    assert total < 8 * 7
    assert total / 2 <= len(calls) <= total / 2 + int(np.asarray(counts).max()) / 2 + more


@pytest.mark.thorough
def test_texts_are_embedded_in_slots(make_model):
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
    _, same = jitted(lambda model: encode_in_slots(model, inputs, model.plan(), rule, slots=2), model)
    assert np.asarray(same).tolist() == counts.tolist()


def test_mistakes_are_told(make_model, monkeypatch):
    model = make_model()
    with pytest.raises(InputError, match="slots is 0, expected 1 or more"):
        encode_in_slots(model, Inputs(ROWS), model.plan(), EarlyExit(0.1), slots=0)
    assert [slots_for(batch) for batch in (1, 3, 8, 33)] == [1, 1, 2, 8]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [slots_for(batch) for batch in (1, 3, 8, 33)] == [1, 1, 4, 16]

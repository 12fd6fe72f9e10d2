"""The loss of examples against NumPy, and the head that it is of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from odelm.models import Classifier, MaskedLM
from odelm.models.cross_entropy import Teacher
from odelm.models.example_loss import example_losses
from odelm.models.loss import loss_sums, row_losses, scored_examples
from odelm.models.parameters import parameters
from tests.calls import compiled, jitted

# float32 sums of a dozen terms of size 1, in another order.
CLOSE = dict(rtol=2e-5, atol=1e-6)
POST = dict(kind="encoder", norm="layernorm", norm_placement="post", positions="learned", token_types=2)


@pytest.fixture(scope="module", params=[{}, pytest.param(POST, marks=pytest.mark.thorough)], ids=["pre", "post"])
def models(request, make_config, randomise):
    """Returns a function from a number of outputs to a classifier, of either placement of the norms."""
    config = make_config(**{"kind": "encoder"} | request.param)
    made = {n: randomise(Classifier(config, outputs=n, rngs=nnx.Rngs(0))) for n in (1, 3)}
    return made.__getitem__


@pytest.fixture
def batch(tokens):
    """Two rows, the first with padding, and one that counts for nothing."""
    tokens = np.concatenate([tokens, tokens[:1]])
    return {
        "tokens": tokens,
        "mask": np.array([[1] * 4 + [0] * 2, [1] * 6, [1] * 6], bool),
        "targets": np.array([[2], [0], [1]], np.int32),
        "weights": np.array([[1], [1], [0]], np.float32),
    }


def nats(logits, targets) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    return np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, targets, 1)[:, 0]


def test_the_loss_of_classes(models, batch):
    model = models(3)
    sums, logits = jitted(lambda m: scored_examples(m, batch, plan=m.plan(steps=2)), model)
    np.testing.assert_allclose(logits, compiled(model)(batch["tokens"], mask=batch["mask"], steps=2), **CLOSE)
    expected = nats(logits, batch["targets"])[:2]
    np.testing.assert_allclose(sums.nats, expected.sum(), **CLOSE)
    np.testing.assert_allclose(sums.objective, expected.mean(), **CLOSE)
    assert float(sums.tokens) == 2 and float(sums.penalty) == 0
    np.testing.assert_allclose(sums.squares, [np.square(expected).sum(), expected.sum(), 2, 2], **CLOSE)
    found, counts = jitted(lambda m: row_losses(m, batch, plan=m.plan(steps=2)), model)
    np.testing.assert_allclose(found, [*expected, 0], **CLOSE)
    assert counts.tolist() == [1, 1, 0]


def test_padding_changes_nothing(models, batch):
    """Tokens at padding are not seen."""
    model = models(3)
    other = batch | {"tokens": np.where(batch["mask"], batch["tokens"], 7)}
    assert (other["tokens"] != batch["tokens"]).any()
    one, two = (jitted(lambda m, b=b: scored_examples(m, b, plan=m.plan(steps=2))[1], model) for b in (batch, other))
    np.testing.assert_array_equal(one, two)


def test_the_loss_of_a_regression(models, batch):
    model, scores = models(1), np.array([[3.5], [0.0], [9.0]], np.float32)
    sums, outputs = jitted(lambda m: scored_examples(m, batch | {"targets": scores}, plan=m.plan()), model)
    assert outputs.shape == (3, 1)
    np.testing.assert_allclose(sums.nats, np.square(outputs - scores)[:2].sum(), **CLOSE)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_penalty_and_a_teacher_are_what_they_say(models, batch, outputs):
    model = models(outputs)
    targets = batch["targets"] if outputs == 3 else batch["targets"].astype(np.float32)
    rng = np.random.default_rng(0)
    hidden, taught = (jnp.asarray(rng.standard_normal((3, 6, 16)), jnp.float32) for _ in range(2))
    options = dict(targets=jnp.asarray(targets), weights=jnp.asarray(batch["weights"]))

    def total(m, x, share=0.25):
        return example_losses(m, x, z_loss=0.1, teacher=Teacher(taught, share), **options)[0]

    found = jitted(lambda m: (total(m, hidden), m.readout(hidden), m.readout(taught)), model)
    value, mine, theirs = (np.asarray(array, np.float64) for array in found)
    if outputs == 1:
        squares = 0.75 * np.square(mine - targets) + 0.25 * np.square(mine - theirs)
        expected = squares[:2].sum()
    else:
        lse, chances = np.log(np.exp(mine).sum(-1)), np.exp(theirs) / np.exp(theirs).sum(-1, keepdims=True)
        soft = lse - (chances * mine).sum(-1)
        expected = (0.75 * nats(mine, targets) + 0.25 * soft + 0.1 * np.square(lse))[:2].sum()
    np.testing.assert_allclose(value, expected, **CLOSE)
    # A teacher that is not learned from leaves no gradient.
    gradient = jitted(
        lambda m: jax.grad(lambda x: example_losses(m, taught, teacher=Teacher(x, 1.0), **options)[0])(hidden), model
    )
    assert not np.asarray(gradient).any()


@pytest.mark.thorough
def test_a_key_drops_units_of_the_head_too(make_config, randomise, batch):
    model = randomise(Classifier(make_config(kind="encoder", dropout=0.5), outputs=3, rngs=nnx.Rngs(0)))
    hidden = jnp.ones((2, 6, 16))
    dropped = [model.readout(hidden, jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert (dropped[0] != dropped[2]).any() and (dropped[0] != model.readout(hidden)).any()
    # Both rows are alike, and lose units of their own.
    assert (dropped[0][0] != dropped[0][1]).any()
    sums = [loss_sums(model, batch, plan=model.plan(steps=2), key=key).nats for key in (None, jax.random.key(0))]
    assert sums[0] != sums[1]


def test_a_classifier_takes_over_the_pooler_of_what_it_starts_from(make_config, randomise):
    source = randomise(MaskedLM(make_config(kind="encoder", sentence_order=True), rngs=nnx.Rngs(0)))
    model = Classifier.from_encoder(source, outputs=3, rngs=nnx.Rngs(1))
    assert (model.config.outputs, model.config.sentence_order) == (3, False)
    own, old = parameters(model), parameters(source)
    np.testing.assert_array_equal(own["head/pool/kernel"], old["order/pool/kernel"])
    assert own["head/out/kernel"].shape == (16, 3)
    again = Classifier.from_encoder(model, outputs=1, rngs=nnx.Rngs(2))
    np.testing.assert_array_equal(parameters(again)["head/pool/kernel"], own["head/pool/kernel"])
    assert parameters(again)["head/out/kernel"].shape == (16, 1)
    model.head.pool.bias[...] = jnp.ones(16)
    assert not np.asarray(source.order.pool.bias[...] == 1).all(), "a copy"

"""The summed losses against NumPy, and their mean over unequal batches."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from odelm.models.loss import LossSums, loss_sums, mean_loss
from odelm.train.evaluate import evaluate, make_loss
from tests.calls import compiled, jitted

# float32 sums of a dozen terms of size 1 to 10, in another order.
TOLERANCE = dict(rtol=2e-5)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    top = wide.max(-1, keepdims=True)
    normaliser = np.log(np.exp(wide - top).sum(-1)) + top[..., 0]
    return normaliser - np.take_along_axis(wide, targets[..., None], -1)[..., 0]


def sums_of_batch(model, batch) -> LossSums:
    return jitted(lambda model: loss_sums(model, batch), model)


@pytest.fixture(scope="module")
def decoder_batch(tokens):
    weights = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], np.float32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "weights": weights}


def test_decoder(make_model, decoder_batch):
    model = make_model()
    sums = sums_of_batch(model, decoder_batch)
    nats = cross_entropy(compiled(model)(decoder_batch["tokens"]), decoder_batch["targets"])
    np.testing.assert_allclose(sums.nats, (nats * decoder_batch["weights"]).sum(), **TOLERANCE)
    assert float(sums.tokens) == 7 and float(sums.orders) == 0
    np.testing.assert_allclose(sums.objective, sums.nats / 7, **TOLERANCE)


def test_encoder_with_positions_weights_and_order(make_model, tokens):
    model = make_model(
        kind="encoder", norm_placement="post", norm="layernorm", positions="learned", sentence_order=True, token_types=2
    )
    tokens = np.concatenate([tokens, np.zeros((1, 6), np.int32)])
    batch = {
        "tokens": tokens,
        "mask": np.array([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5], bool),
        "token_types": np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0] * 6], np.int32),
        "positions": np.array([[1, 4], [2, 5], [5, 5]], np.int32),
        "targets": np.array([[7, 2], [3, 1], [0, 0]], np.int32),
        "weights": np.array([[1, 1], [1, 0], [0, 0]], np.float32),
        "order": np.array([1, 0, 1], np.int32),
        "order_weights": np.array([0, 1, 1], np.float32),
    }
    sums = sums_of_batch(model, batch)
    hidden = compiled(model.encode)(tokens, mask=batch["mask"], token_types=batch["token_types"])
    rows = np.arange(3)[:, None]
    nats = cross_entropy(np.asarray(model.readout(hidden))[rows, batch["positions"]], batch["targets"])
    np.testing.assert_allclose(sums.nats, (nats * batch["weights"]).sum(), **TOLERANCE)
    order = cross_entropy(model.readout_order(hidden), batch["order"])
    np.testing.assert_allclose(sums.order_nats, order[1:].sum(), **TOLERANCE)
    assert (float(sums.tokens), float(sums.orders)) == (3, 2)
    np.testing.assert_allclose(sums.objective, sums.nats / 3 + sums.order_nats / 2, **TOLERANCE)


def test_every_token_weighs_the_same_across_batches(make_config, make_model, decoder_batch):
    small = {name: array[1:] for name, array in decoder_batch.items()}
    large = {name: array[:1] for name, array in decoder_batch.items()}
    graph, params = nnx.split(make_model(), nnx.Param)
    loss = make_loss(graph)
    grid = np.arange(5, dtype=np.float32)
    whole, *parts = (loss(params, batch, grid) for batch in (decoder_batch, small, large))
    together, apart = mean_loss([whole]), mean_loss(parts)
    assert apart.loss == pytest.approx(together.loss, rel=1e-5)
    assert apart.stderr == pytest.approx(together.stderr, rel=1e-3)
    assert apart.tokens == together.tokens
    first, second = (mean_loss([part]).loss for part in parts)
    difference = abs((first + second) / 2 - together.loss)
    assert difference > 1e-3 * together.loss, "the batches must differ for this to test anything"


def sums_of(nats: np.ndarray, tokens: np.ndarray) -> LossSums:
    """Returns the sums of rows with so many nats and tokens."""
    squares = np.array([(nats**2).sum(), (nats * tokens).sum(), (tokens**2).sum(), (tokens > 0).sum()], np.float32)
    zero = jnp.float32(0)
    return LossSums(jnp.float32(nats.sum()), jnp.float32(tokens.sum()), zero, zero, jnp.asarray(squares), zero)


def test_the_standard_error_is_that_of_means_over_many_samples():
    """Rows of different lengths, whose losses scatter by 0.5 around 3: samples of 100 of them, drawn 400 times."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        tokens = rng.integers(1, 128, 100).astype(np.float64)
        mean = mean_loss([sums_of(tokens * rng.normal(3, 0.5, 100), tokens)])
        means.append(mean.loss)
        errors.append(mean.stderr)
    # A spread over 400 samples is itself known to a twenty-fifth.
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.15)
    assert np.mean(means) == pytest.approx(3, abs=0.01)


def test_a_single_row_has_no_standard_error():
    mean = mean_loss([sums_of(np.array([6.0, 0.0]), np.array([2.0, 0.0]))])
    assert (mean.loss, mean.tokens) == (3.0, 2) and np.isnan(mean.stderr)


def test_the_rows_of_a_batch_are_what_its_sums_say(make_model, decoder_batch):
    sums = sums_of_batch(make_model(), decoder_batch)
    rows = [sums_of_batch(make_model(), {name: a[i : i + 1] for name, a in decoder_batch.items()}) for i in range(2)]
    nats, tokens = (np.array([float(getattr(row, name)) for row in rows]) for name in ("nats", "tokens"))
    np.testing.assert_allclose(sums.squares, sums_of(nats, tokens).squares, rtol=1e-5)


def test_evaluation_takes_the_configured_step_counts(make_config):
    from odelm.config import Config, TrainConfig

    seen = []

    def loss(params, batch, grid):
        seen.append(np.asarray(grid).tolist())
        return sums_of(np.array([len(grid), 0.0]) / 2, np.ones(2))

    config = Config(model=make_config(), train=TrainConfig(eval_steps=(1, 2)))
    losses = evaluate(loss, None, [{}], config)
    assert {steps: mean.loss for steps, mean in losses.items()} == {4: 1.25, 2: 0.75, 1: 0.5}
    assert seen == [[0, 1, 2, 3, 4], [0, 2, 4], [0, 4]]

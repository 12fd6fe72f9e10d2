"""The summed losses against NumPy, and their mean over unequal batches."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from odelm.models.loss import LossSums, loss_sums
from odelm.train.evaluate import evaluate, make_loss, mean_loss

# float32 sums of a dozen terms of size 1 to 10, in another order.
TOLERANCE = dict(rtol=2e-5)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    top = wide.max(-1, keepdims=True)
    normaliser = np.log(np.exp(wide - top).sum(-1)) + top[..., 0]
    return normaliser - np.take_along_axis(wide, targets[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def decoder_batch(tokens):
    weights = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], np.float32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "weights": weights}


def test_decoder(make_model, decoder_batch):
    model = make_model()
    sums = loss_sums(model, decoder_batch)
    nats = cross_entropy(model(decoder_batch["tokens"]), decoder_batch["targets"])
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
    sums = loss_sums(model, batch)
    hidden = model.encode(tokens, mask=batch["mask"], token_types=batch["token_types"])
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
    together = mean_loss(loss, params, [decoder_batch], grid)
    assert mean_loss(loss, params, [small, large], grid) == pytest.approx(together, rel=1e-5)
    first, second = (mean_loss(loss, params, [part], grid) for part in (small, large))
    assert abs((first + second) / 2 - together) > 1e-3 * together, "the batches must differ for this to test anything"


def test_evaluation_takes_the_configured_step_counts(make_config):
    from odelm.config import Config, TrainConfig

    seen = []

    def loss(params, batch, grid):
        seen.append(np.asarray(grid).tolist())
        return LossSums(jnp.float32(len(grid)), jnp.float32(2), jnp.float32(0), jnp.float32(0))

    config = Config(model=make_config(), train=TrainConfig(eval_steps=(1, 2)))
    assert evaluate(loss, None, [{}], config) == {4: 2.5, 2: 1.5, 1: 1.0}
    assert seen == [[0, 1, 2, 3, 4], [0, 2, 4], [0, 4]]

"""Losses of next tokens, masked tokens or examples, as sums, so that batches and devices add up exactly."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from odelm.models.arrays import pick
from odelm.models.cross_entropy import Teacher, cross_entropy, summed_cross_entropy
from odelm.models.example_loss import example_losses
from odelm.models.inputs import Inputs
from odelm.models.lm import CausalLM, Classifier, MaskedLM
from odelm.models.transformer import DepthPlan

Batch = Mapping[str, jax.Array | np.ndarray]


def real_tokens(batch: Batch) -> jax.Array:
    """Returns how many tokens of a batch are not padding, int32 ()."""
    real = batch["mask"] if "mask" in batch else batch["weights"]  # of a decoder's rows, which predict every token
    return jnp.sum(jnp.asarray(real) != 0, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """float32 scalars: nats summed over predicted tokens, and how many there were; the same for sentence order.

    For a classifier each example counts as one token, and for a regression the squared errors count as nats.
    """

    nats: jax.Array
    tokens: jax.Array
    order_nats: jax.Array
    orders: jax.Array
    squares: jax.Array
    """float32 (4,), summed over rows with n tokens and x nats: x², x n, n² and 1, from which a standard error is
    computed."""
    penalty: jax.Array
    """The summed terms that are minimised beside the nats (`z_loss`), or in place of a share of them (`taught_by`)."""

    @property
    def loss(self) -> jax.Array:
        """Mean nats per predicted token."""
        return self.nats / jnp.maximum(self.tokens, 1)

    @property
    def objective(self) -> jax.Array:
        """What training minimises: the token loss, plus the sentence-order loss where there is one (ALBERT)."""
        return self.share(self.tokens, self.orders)

    def share(self, tokens: jax.Array, orders: jax.Array) -> jax.Array:
        """Returns the contribution of these sums to the objective of a batch that predicts `tokens` tokens and `orders`
        orders in all."""
        nats = self.nats + self.penalty
        return nats / jnp.maximum(tokens, 1) + self.order_nats / jnp.maximum(orders, 1)


@dataclass(frozen=True)
class MeanLoss:
    """Nats per predicted token over some rows of text, and its standard error, the rows being a sample of all such
    rows."""

    loss: float
    stderr: float
    """By rows, which are the units that were drawn (Cochran 1977, Sampling Techniques, section 2.11: the ratio of two
    means); nan for a single row."""
    tokens: int


def mean_loss(batches: Iterable[LossSums]) -> MeanLoss:
    """Returns the mean over batches in which each token weighs the same."""
    sums = [jax.device_get(batch) for batch in batches]
    nats, tokens = (sum(float(getattr(batch, name)) for batch in sums) for name in ("nats", "tokens"))
    return _mean_loss(nats, tokens, np.stack([batch.squares for batch in sums]).astype(np.float64).sum(axis=0))


def mean_loss_of_rows(nats: np.ndarray, tokens: np.ndarray) -> MeanLoss:
    """Returns the mean over rows, given the nats of each and how many tokens it predicts, float (rows,) each."""
    squares = [np.square(nats).sum(), (nats * tokens).sum(), np.square(tokens).sum(), len(tokens)]
    return _mean_loss(float(nats.sum()), float(tokens.sum()), np.array(squares, np.float64))


def _mean_loss(nats: float, tokens: float, squares: np.ndarray) -> MeanLoss:
    xx, xn, nn, rows = map(float, squares)
    mean = nats / tokens
    spread = xx - 2 * mean * xn + mean**2 * nn
    stderr = math.sqrt(max(spread, 0.0) * rows / (rows - 1)) / tokens if rows > 1 else math.nan
    return MeanLoss(mean, stderr, int(tokens))


def loss_sums(
    model: CausalLM | MaskedLM | Classifier,
    batch: Batch,
    *,
    plan: DepthPlan | None = None,
    key: jax.Array | None = None,
    z_loss: float = 0.0,
    taught_by: Teacher | None = None,
) -> LossSums:
    """Returns the summed loss of a batch of `odelm.data.loader`; the options are those of `run`.

    A masked model reads out only the positions it has to predict, `positions` (B, P) of (B, L).
    """
    data = {name: jnp.asarray(array) for name, array in batch.items()}
    hidden, _ = model.run(inputs_of(data), model.plan() if plan is None else plan, key=key)
    return sums_from_hidden(model, hidden, data, key=key, z_loss=z_loss, taught_by=taught_by)


def scored_examples(model: Classifier, batch: Batch, *, plan: DepthPlan) -> tuple[LossSums, jax.Array]:
    """Returns the summed loss of a batch of examples, and the model's outputs for each example, float32 (B,
    outputs)."""
    data = {name: jnp.asarray(array) for name, array in batch.items()}
    hidden, _ = model.run(inputs_of(data), plan)
    return sums_from_hidden(model, hidden, data), model.readout(hidden)


def row_losses(
    model: CausalLM | MaskedLM | Classifier, batch: Batch, *, plan: DepthPlan
) -> tuple[jax.Array, jax.Array]:
    """Returns the nats of each row of a batch, summed over its predicted tokens, and the number of those tokens,
    float32 (B,) each."""
    data = {name: jnp.asarray(array) for name, array in batch.items()}
    hidden, _ = model.run(inputs_of(data), plan)
    _, nats = _losses(model, hidden, data)
    return nats.sum(axis=1), data["weights"].sum(axis=1)


def readout_of(
    model: CausalLM | MaskedLM, states: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns the `Readout.parts` of the logits at the positions to predict, given the states (B, L, D) of a batch."""
    if "positions" in batch:
        states = pick(states, jnp.asarray(batch["positions"]))
    return model.head.parts(states, model.embed.tokens[...])


def _squares(nats: jax.Array, weights: jax.Array) -> jax.Array:
    x, n = nats.sum(axis=1), weights.sum(axis=1)
    return jnp.stack([jnp.square(x).sum(), (x * n).sum(), jnp.square(n).sum(), (n > 0).sum().astype(x.dtype)])


def inputs_of(batch: Batch) -> Inputs:
    """Returns the model's inputs from a batch. The batch's `mask`, bool (B, L), is True up to where a row's padding
    begins."""
    mask = batch.get("mask")
    lengths = None if mask is None else mask.sum(axis=1, dtype=np.int32)
    named = {name: batch.get(name) for name in ("token_types", "segments")}
    return Inputs(tokens=batch["tokens"], lengths=lengths, **named)


def sums_from_hidden(
    model: CausalLM | MaskedLM | Classifier,
    hidden: jax.Array,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    z_loss: float = 0.0,
    taught_by: Teacher | None = None,
) -> LossSums:
    """Returns the summed loss given the hidden states (B, L, D) of the batch.

    `key` turns the dropout of a classifier's head on. `taught_by` has the hidden states (B, L, D) whose predictions are
    learned in place of a share of the text; with a readout of its own, it has what `readout_of` returns for those
    states.
    """
    weights = jnp.asarray(batch["weights"])
    total, nats = _losses(model, hidden, batch, key=key, z_loss=z_loss, taught_by=taught_by)
    # The nats have no gradient of their own: with a penalty, its gradient is that of the whole sum.
    penalty = jnp.zeros(()) if not z_loss and taught_by is None else total - nats.sum()
    zero = jnp.zeros(())
    order_nats, orders = zero, zero
    if "order" in batch and isinstance(model, MaskedLM):
        rows = jnp.asarray(batch["order_weights"])
        logits = model.readout_order(hidden)
        order_nats = (cross_entropy(logits, jnp.asarray(batch["order"]))[1] * rows).sum()
        orders = rows.sum()
    nats_sum = total - penalty
    return LossSums(nats_sum, weights.sum(), order_nats, orders, _squares(nats, weights), penalty)


def _losses(
    model: CausalLM | MaskedLM | Classifier,
    hidden: jax.Array,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    z_loss: float = 0.0,
    taught_by: Teacher | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum that is minimised, and the nats of each prediction, float32 (B, P), without a gradient."""
    targets, weights = jnp.asarray(batch["targets"]), jnp.asarray(batch["weights"])
    if isinstance(model, Classifier):
        total, nats = example_losses(model, hidden, targets, weights, key=key, z_loss=z_loss, teacher=taught_by)
        return total, jax.lax.stop_gradient(nats)
    teacher = taught_by
    if teacher is not None and teacher.matrix is None:
        teacher = Teacher(readout_of(model, teacher.x, batch)[0], teacher.share)
    parts = readout_of(model, hidden, batch)
    return summed_cross_entropy(*parts, targets, weights, z_loss=z_loss, teacher=teacher)

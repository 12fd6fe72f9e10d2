"""The training loss of a classifier: the cross-entropy of labelled examples, or the squared error of a regression."""

import jax
import jax.numpy as jnp

from odelm.models.cross_entropy import Teacher, cross_entropy
from odelm.models.lm import Classifier


def example_losses(
    model: Classifier,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    key: jax.Array | None = None,
    z_loss: float = 0.0,
    teacher: Teacher | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum that is minimised, float32 (), and the loss of each example, float32 (B, 1).

    The loss of an example is in nats; for a regression it is the squared error. The options change the sum only, not
    the losses of the examples.

    Args:
        hidden: (B, L, D).
        targets: int32 (B, 1), classes; for a regression float32 (B, 1).
        weights: float32 (B, 1), 0 for rows of padding.
        key: turns the head's dropout on.
        z_loss: as in `odelm.models.cross_entropy.summed_cross_entropy`; a regression has none.
        teacher: the hidden states (B, L, D) whose predictions are learned in place of a share of the targets.
    """
    outputs, targets, weights = model.readout(hidden, key), targets[:, 0], weights[:, 0]
    taught = None if teacher is None else jax.lax.stop_gradient(model.readout(teacher.x))
    if model.config.outputs == 1:
        losses = learned = jnp.square(outputs[:, 0] - targets)
        if teacher is not None and taught is not None:
            learned = losses + teacher.share * (jnp.square(outputs - taught)[:, 0] - losses)
    else:
        lse, losses = cross_entropy(outputs, targets)
        learned = losses + z_loss * jnp.square(lse)
        if teacher is not None and taught is not None:
            learned = learned + teacher.share * (lse - (jax.nn.softmax(taught) * outputs).sum(-1) - losses)
    return (learned * weights).sum(), (losses * weights)[:, None]

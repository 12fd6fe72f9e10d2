"""The operations that training needs per token, and the share of a device's peak that they use."""

import jax
import numpy as np

from odelm.config import Config, ModelConfig
from odelm.train.draws import draw_grid

PEAKS = {
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6": 918e12,
}  # fmt: skip
"""Published dense bfloat16 operations a second, by name; the first name that is part of the device's name applies
(NVIDIA's and Google's data sheets)."""


def training_flops(model: ModelConfig, *, steps: float, length: int, predicted: float = 1.0) -> float:
    """Returns the operations that an update needs per token at `steps` steps, of one evaluation each, over the core.

    They are those of the forward pass, and twice as many for the backward pass: 2 for each weight of a matrix, those of
    attention (half of them where it is causal), and those of the readout for the share of tokens that is predicted.
    Recomputation that saves memory is not counted.
    """
    D, F, E = model.width, model.feedforward_size, model.embed_size
    up = 2 * F if model.activation == "swiglu" else F
    attention = 4 * D * length * (0.5 if model.kind == "decoder" else 1.0)
    inputs = D * (D + 2 * model.key_value_heads * model.head_size)
    layer = 2 * (inputs + D * D + D * up + F * D) + attention
    readout = 2 * (E * model.vocab_size + (D * E if model.kind == "encoder" or model.embed_dim else 0))
    project = 2 * E * D if model.embed_dim else 0
    return 3 * (layer * model.inner_blocks * (model.ends + steps) + project + predicted * readout)


def predicted_share(config: Config) -> float:
    """Returns the share of the tokens that a model reads out: all, those that are masked, or none for a classifier."""
    if config.model.outputs:
        return 0.0
    return 1.0 if config.model.kind == "decoder" else config.data.mask_rate


def cost_of(config: Config, updates: int) -> str:
    """Returns a sentence that compares the cost of the steps that were drawn with that of full depth."""
    drawn = np.mean([len(draw_grid(config, update)) - 1 for update in range(0, updates, max(updates // 1000, 1))])
    model, length, predicted = config.model, config.train.length, predicted_share(config)
    random, full = (
        training_flops(model, steps=float(n), length=length, predicted=predicted) for n in (drawn, model.core)
    )
    return (
        f"updates of {drawn:.1f} of {model.core} depth steps on average needed {random / full:.0%} of the operations "
        "of full depth"
    )


def peak_flops() -> float | None:
    """Returns the published peak of the first device, None where it is unknown."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAKS.items() if name in kind), None)

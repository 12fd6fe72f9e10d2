"""The operations that training needs for a token, and the share of a card's peak that they are."""

import jax
import numpy as np

from odelm.config import Config, ModelConfig
from odelm.train.draws import draw_grid

PEAKS = {
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6": 918e12,
}  # fmt: skip
"""Published operations a second in bfloat16, dense, by the first name that is part of a device's (NVIDIA's and Google's
data sheets)."""


def training_flops(model: ModelConfig, *, steps: float, length: int, predicted: float = 1.0) -> float:
    """Returns the operations an update needs for each token at so many steps of one evaluation over the core.

    Forward and twice that back: 2 for each weight of a matrix, those of attention (half of them where it is causal),
    and those of the readout for the share of tokens that is predicted. Nothing for what is computed again to save room.
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
    """Returns a sentence: what the steps that were drawn cost against full depth."""
    drawn = np.mean([len(draw_grid(config, update)) - 1 for update in range(0, updates, max(updates // 1000, 1))])
    model, length = config.model, config.train.length
    random, full = (training_flops(model, steps=float(n), length=length) for n in (drawn, model.core))
    return (
        f"updates of {drawn:.1f} of {model.core} depth steps on average needed {random / full:.0%} of the operations "
        "of full depth"
    )


def peak_flops() -> float | None:
    """Returns the published peak of the first device, None where it is unknown."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAKS.items() if name in kind), None)

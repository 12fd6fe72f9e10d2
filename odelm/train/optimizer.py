"""AdamW or Muon with warm-up, a decay and clipping, all from Optax.

AdamW is Loshchilov and Hutter 2019, arXiv 1711.05101. Muon makes the momentum of a matrix orthogonal (Jordan et al.
2024, kellerjordan.github.io/posts/muon), by an iteration of matrix products: in a shared model on one block only.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from odelm.config import ModelConfig, OptimizerConfig
from odelm.models.parameters import name_of

MUON_MATRICES: tuple[tuple[str, MuonDimensionNumbers], ...] = (
    # (D, 3, H, K): queries, keys and values are three matrices. (D, 2, J, K): keys and values are two.
    (r".*/attention/(qkv|key_value)/kernel", MuonDimensionNumbers(reduction_axis=0, output_axis=(2, 3))),
    # (D, H, K)
    (r".*/attention/query/kernel", MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))),
    # (H, K, D)
    (r".*/attention/out/kernel", MuonDimensionNumbers(reduction_axis=(0, 1), output_axis=2)),
    (r".*/feedforward/(up|down)/kernel", MuonDimensionNumbers(reduction_axis=0, output_axis=1)),
)
"""The matrices of the blocks, which Muon trains, and which of their axes are summed over."""


def schedule(config: OptimizerConfig, updates: int, *, peak: float | None = None) -> optax.Schedule:
    """Returns the learning rate as a function of the update; `peak` replaces the config's peak."""
    peak = config.learning_rate if peak is None else peak
    final = peak * config.final_fraction
    warmup = min(config.warmup, updates)
    rest = max(updates - warmup, 1)
    match config.decay:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
        case "linear":
            after = optax.linear_schedule(peak, final, rest)
        case "stable":
            falling = min(max(round(config.decay_share * updates), 1), rest)
            after = optax.linear_schedule(peak, final, falling, transition_begin=rest - falling)
        case _:
            after = optax.constant_schedule(peak)
    first = 0.0 if config.warmup_from_zero else peak / (warmup + 1)
    return optax.join_schedules([optax.linear_schedule(first, peak, max(warmup, 1)), after], [warmup])


def schedule_change(before: int, now: int, config: OptimizerConfig, step: int) -> str | None:
    """Returns how the learning rate changes if a run of `before` updates is continued to `now`; None if it does not."""
    old, new = (jnp.asarray(schedule(config, updates)(step)).item() for updates in (before, now))
    if before == now or math.isclose(old, new, rel_tol=1e-3):
        return None
    return (
        f"train.updates is {now}, and was {before}: the {config.decay} decay now ends after update {now}, so the next "
        f"update has a learning rate of {new:.3g}, in place of {old:.3g}"
    )


def make_optimizer(config: OptimizerConfig, updates: int, model: ModelConfig) -> optax.GradientTransformation:
    """Returns the whole chain. A shared block's gradient is the sum over its uses; clipping sees that sum."""
    # This is `optax.adamw` with per-matrix rates applied before weight decay, so that decay takes the same share of
    # every matrix.
    own_rates = [] if model.reference_width is None else [optax.stateless(functools.partial(_scaled_by_width, model))]
    adamw = optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        *own_rates,
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule(config, updates)),
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm), adamw if config.kind == "adamw" else _muon(config, updates, adamw)
    )


def _muon(config: OptimizerConfig, updates: int, adamw: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns Muon for the matrices of the blocks, and AdamW for all else.

    A matrix changes by the rate times `sqrt(max(1, outputs / inputs))` in each direction, whatever its gradient.
    """
    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=_dimensions),
        optax.stateless(_scaled_by_shape),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config, updates, peak=config.muon_learning_rate)),
    )
    return optax.partition({"muon": muon, "adamw": adamw}, _labels)


def muon_dimensions(name: str) -> MuonDimensionNumbers | None:
    """Returns the axes of a parameter that Muon trains, by its name; None for those that AdamW trains."""
    return next((axes for pattern, axes in MUON_MATRICES if re.fullmatch(pattern, name)), None)


def _scaled_by_shape(updates: Any, _: Any) -> Any:
    """Returns each matrix times `sqrt(max(1, outputs / inputs))`: the change in its output is then of the same size
    whatever its shape."""

    def scaled(path: tuple, update: jax.Array) -> jax.Array:
        axes = muon_dimensions(name_of(path))
        assert axes is not None
        inputs, outputs = (_size(update.shape, axis) for axis in (axes.reduction_axis, axes.output_axis))
        return math.sqrt(max(1.0, outputs / inputs)) * update

    return jax.tree_util.tree_map_with_path(scaled, updates)


def _size(shape: tuple[int, ...], axes: int | Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in ([axes] if isinstance(axes, int) else axes))


WIDTH_POWERS = (
    (r".*/(attention/(qkv|query|key_value|out)|feedforward/(up|down))/kernel|head/project/kernel", -1.0),
    (r"(embed|head)/tokens|embed/(learned|types)", -0.5),
)
"""The powers of `width / reference_width` by which AdamW's updates are multiplied: for matrices that sum over the width
or the hidden units, and for embeddings, which are as small as `1/sqrt(width)`; other updates are not scaled."""


def _scaled_by_width(model: ModelConfig, updates: Any, _: Any) -> Any:
    """Returns the updates scaled to have the same effect here as at the config's `reference_width` (Yang et al. 2022,
    arXiv 2203.03466, table 8)."""
    assert model.reference_width is not None
    ratio = model.width / model.reference_width

    def scaled(path: tuple, update: jax.Array) -> jax.Array:
        power = next((power for pattern, power in WIDTH_POWERS if re.fullmatch(pattern, name_of(path))), 0.0)
        return ratio**power * update if power else update

    return jax.tree_util.tree_map_with_path(scaled, updates)


def _labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "adamw" if muon_dimensions(name_of(path)) is None else "muon", params
    )


def _dimensions(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: muon_dimensions(name_of(path)), params)


def decayed(params: Any) -> Any:
    """Returns a tree of bools: True for matrices and embeddings, False for biases, norm scales and lane weights."""

    def is_decayed(path: tuple, _: jax.Array) -> bool:
        return not any(getattr(key, "key", None) in ("bias", "scale", "weights") for key in path)

    return jax.tree_util.tree_map_with_path(is_decayed, params)

"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with warm-up, a decay and clipping, all from Optax."""

from typing import Any

import jax
import optax

from odelm.config import OptimizerConfig


def schedule(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """Returns the learning rate as a function of the update."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup, updates)
    rest = max(updates - warmup, 1)
    match config.decay:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
        case "linear":
            after = optax.linear_schedule(peak, final, rest)
        case _:
            after = optax.constant_schedule(peak)
    first = 0.0 if config.warmup_from_zero else peak / (warmup + 1)
    return optax.join_schedules([optax.linear_schedule(first, peak, max(warmup, 1)), after], [warmup])


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """Returns the whole chain. A shared block's gradient is the sum over its uses; clipping sees that sum."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, updates),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def decayed(params: Any) -> Any:
    """Returns a tree of bools: True for matrices and embeddings, False for biases and norm scales."""

    def is_decayed(path: tuple, _: jax.Array) -> bool:
        return not any(getattr(key, "key", None) in ("bias", "scale") for key in path)

    return jax.tree_util.tree_map_with_path(is_decayed, params)

"""How a token is drawn from logits: temperature, filters and a penalty on repetition."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from odelm import rng
from odelm.arguments import number, whole

COLDEST = 1e-25
"""The smallest temperature used for sampling: logits divided by it must stay within float32, and above the least score
of the kernels."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the numbers may change without recompilation."""

    temperature: jax.Array | float = 0.0
    """What the logits are divided by; 0 takes the most likely token."""
    top_k: jax.Array | int = 0
    """Draw among this many most likely tokens, and those that are as likely as the last of them; 0 is all."""
    top_p: jax.Array | float = 1.0
    """Draw among the most likely tokens that together have this probability (Holtzman et al. 2020, arXiv
    1904.09751)."""
    min_p: jax.Array | float = 0.0
    """Draw among tokens with at least this probability, relative to the most likely one (Nguyen et al. 2024, arXiv
    2407.01082)."""
    repetition_penalty: jax.Array | float = 1.0
    """The logits of tokens that occurred before are divided by this, or multiplied by it if they are negative (Keskar
    et al. 2019, arXiv 1909.05858)."""
    greedy: bool | None = dataclasses.field(default=None, metadata=dict(static=True))
    """Whether the temperature is 0, if this is known at compilation, so that only one way to draw is compiled; None
    compiles both ways."""


def sampling_options(
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Sampling:
    """Returns the options as compiled programs take them; InputError for one out of its range.

    A temperature below `COLDEST` is taken as 0: logits divided by it are no longer finite, and a token other than the
    most likely one would not be drawn. A `top_k` beyond int32 means all tokens, as does any beyond the vocabulary.
    """
    temperature = number("temperature", temperature, lambda x: 0 <= x < math.inf, "a number, 0 or more")
    top_k = whole("top_k", top_k, least=0, expected="a whole number of at least 1, or 0 for all")
    top_p = number("top_p", top_p, lambda x: 0 < x <= 1, "a number above 0, at most 1")
    min_p = number("min_p", min_p, lambda x: 0 <= x <= 1, "a number from 0 to 1")
    repetition_penalty = number(
        "repetition_penalty", repetition_penalty, lambda x: 0 < x < math.inf, "a number above 0"
    )
    temperature = 0.0 if temperature < COLDEST else temperature
    top_k = min(top_k, np.iinfo(np.int32).max)
    return Sampling(
        jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p),
        jnp.float32(repetition_penalty), greedy=bool(temperature == 0),
    )  # fmt: skip


def sampling_key(seed: int) -> jax.Array:
    """Returns the key that tokens are drawn with; InputError for a seed out of its range."""
    return rng.key(whole("seed", seed, least=0, most=2**31 - 1), "sample")


def draw(logits: jax.Array, sampling: Sampling, key: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Returns a token for each row of float32 logits (B, V), int32 (B,).

    `seen` is bool (B, V), which tokens occur in each row; None without a repetition penalty.
    """
    logits = penalised(logits, sampling, seen)

    def sampled() -> jax.Array:
        noise = jax.random.gumbel(key, logits.shape, logits.dtype)
        return jnp.argmax(_filtered(logits, sampling) + noise, axis=-1).astype(jnp.int32)

    return _either(sampling, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32), sampled)


def log_chances(logits: jax.Array, sampling: Sampling, seen: jax.Array | None = None) -> jax.Array:
    """Returns the log-probability with which `draw` draws each token, float32 (B, V), of logits (B, V)."""
    logits = penalised(logits, sampling, seen)

    def likeliest() -> jax.Array:
        chosen = jnp.arange(logits.shape[-1])[None] == jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(chosen, jnp.zeros((), logits.dtype), -jnp.inf)

    return _either(sampling, likeliest, lambda: jax.nn.log_softmax(_filtered(logits, sampling), axis=-1))


def penalised(logits: jax.Array, sampling: Sampling, seen: jax.Array | None) -> jax.Array:
    """Returns the logits (B, V), with the repetition penalty applied to the tokens in `seen`."""
    if seen is None:
        return logits
    penalty = jnp.asarray(sampling.repetition_penalty, logits.dtype)
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _either(sampling: Sampling, likeliest: Callable[[], jax.Array], drawn: Callable[[], jax.Array]) -> jax.Array:
    """Returns `likeliest()` if the temperature is 0, else `drawn()`."""
    if sampling.greedy is None:
        return jax.lax.cond(jnp.asarray(sampling.temperature) == 0, likeliest, drawn)
    return likeliest() if sampling.greedy else drawn()


def _filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the logits divided by the temperature, with minus infinity for tokens that cannot be drawn."""
    scaled = logits / jnp.asarray(sampling.temperature, logits.dtype)
    ranked = jnp.sort(scaled, axis=-1, descending=True)
    chances = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    ranks = jnp.arange(logits.shape[-1])[None]
    top_k = jnp.where(jnp.asarray(sampling.top_k) > 0, sampling.top_k, logits.shape[-1])
    # By rounding, sums of probabilities reach 1 before the last token.
    likely = (before < sampling.top_p) | (jnp.asarray(sampling.top_p) >= 1)
    kept = (ranks < top_k) & likely & (chances >= sampling.min_p * chances[:, :1])
    # Each rule keeps the first tokens of the ranking, at least one.
    count = jnp.maximum(kept.sum(axis=-1, keepdims=True), 1)
    least = jnp.take_along_axis(ranked, count - 1, axis=-1)
    return jnp.where(scaled >= least, scaled, -jnp.inf)

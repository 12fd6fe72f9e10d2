"""The only place that makes random keys: each is a pure function of (seed, stream, step).

Nothing carries generator state, so a resumed run draws what the uninterrupted one would have drawn, and
every process of a job draws the same.
"""

import zlib

import jax
import numpy as np


def key(seed: int, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """Returns the JAX key of `stream` (a purpose, such as "dropout") at `step`, which may be traced."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _number(stream)), step)


def host(seed: int, stream: str, step: int = 0) -> np.random.Generator:
    """Returns the NumPy generator of `stream` at `step`, for draws made outside compiled code."""
    return np.random.default_rng([seed, _number(stream), step])


def _number(stream: str) -> int:
    return zlib.crc32(stream.encode()) & 0x7FFFFFFF

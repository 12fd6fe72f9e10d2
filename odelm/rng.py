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


def bits(seed: int, stream: str, rows: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` random 64-bit numbers for each of `rows`, uint64 (B, count): a function of (seed, stream, row).

    A generator a row would take longer to make than all its draws. This is SplitMix64 (Steele, Lea and Flood 2014,
    "Fast splittable pseudorandom number generators", section 4) at places far apart in its sequence.
    """
    base = host(seed, stream).integers(2**64, dtype=np.uint64)
    starts = _mixed(base + np.asarray(rows, np.uint64) * _GAMMA)
    return _mixed(starts[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GAMMA)


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _number(stream: str) -> int:
    return zlib.crc32(stream.encode()) & 0x7FFFFFFF

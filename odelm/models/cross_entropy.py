"""Cross-entropy of a linear readout, without ever holding the logits of all tokens.

The logits of 32 x 1,024 tokens over 50,304 words are 6.6 GB in float32, and their gradient takes as much again. Here
they are computed for one piece of the tokens at a time. Each piece leaves its loss and, if a gradient is asked for, its
share of the gradients up to one factor that is still unknown, the one by which the summed loss is multiplied. So
nothing is computed twice.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from odelm.models.arrays import along_last, batch_parts, is_explicit, pick_last

PIECE_BYTES = 1 << 30
"""The size of the logits that are held at once, in bytes of float32 (4 GiB of device memory with the arrays derived
from them)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Teacher:
    """What a model learns from beside the text: the predictions that are read from other states, by the same readout or
    another, without a gradient (Hinton et al. 2015, arXiv 1503.02531, at temperature 1)."""

    x: jax.Array
    """(B, L, E), the teacher's states."""
    share: jax.Array | float
    """The teacher's share of what is learned: 0 is none, 1 is all."""
    matrix: jax.Array | None = None
    """(V, E), the matrix of the teacher's own readout, or None."""
    bias: jax.Array | None = None
    """float32 (V,), the bias of that readout, or None."""

    def logits(self, x: jax.Array, matrix: jax.Array, bias: jax.Array | None, *, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the logits of a piece of its states, read by `matrix` and `bias` unless it has its own readout."""
        if self.matrix is None:
            return _logits(x, matrix, bias, dtype=dtype)
        return _logits(x, self.matrix.astype(x.dtype), self.bias, dtype=dtype)


def summed_cross_entropy(
    x: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    teacher: Teacher | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of `-log softmax(x matrix^T + bias)` at the targets, and each token's share of it.

    Products are in the dtype of `x`, all else is float32. The shares have no gradient, the sum has one in `x`, `matrix`
    and `bias`.

    Args:
        x: (B, L, E).
        matrix: (V, E).
        bias: float32 (V,), or None.
        targets: int32 (B, L).
        weights: float32 (B, L), 0 where nothing is predicted.
        z_loss: the weight of `logsumexp(logits)^2`, which is added to the sum and keeps logits small (Chowdhery et al.
            2022, arXiv 2204.02311, section 5); the tokens' shares exclude it.
        teacher: its predictions are learned in place of a fraction of the targets; the tokens' shares exclude it.
        piece_bytes: the size of the logits that are held at once, in float32.
    """
    pieces = _count_pieces(targets.shape, matrix.shape[0], piece_bytes)
    total, nats = cast(tuple[jax.Array, jax.Array], _summed(x, matrix, bias, targets, weights, teacher, z_loss, pieces))
    return total, jax.lax.stop_gradient(nats)


def _count_pieces(shape: tuple[int, ...], words: int, piece_bytes: int) -> int:
    """Returns into how many pieces of equal length the rows are cut: the smallest sufficient divisor of their length.

    `piece_bytes` counts the bytes on one device.
    """
    wanted = min(math.ceil(4 * math.prod(shape) * words / (piece_bytes * batch_parts())), shape[1])
    return next(count for count in range(max(wanted, 1), shape[1] + 1) if shape[1] % count == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _summed(
    x: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    teacher: Teacher | None,
    z_loss: float,
    pieces: int,
) -> tuple[jax.Array, jax.Array]:
    matrix = matrix.astype(x.dtype)

    def body(total: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        part, targets, weights, *taught = piece
        logits = _logits(part, matrix, bias)
        lse, nats = read_logits(logits, targets)
        learned = nats
        if teacher is not None:
            chances = jax.nn.softmax(teacher.logits(taught[0], matrix, bias))
            learned = learned + teacher.share * (lse - (chances * logits).sum(-1) - nats)
        return total + ((learned + z_loss * jnp.square(lse)) * weights).sum(), nats * weights

    total, nats = _over(body, jnp.zeros(()), _cut((x, targets, weights, *_taught(teacher)), pieces))
    return total, _joined(nats)


def _forward(
    x: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    teacher: Teacher | None,
    z_loss: float,
    pieces: int,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    small = matrix.astype(x.dtype)

    def body(sums: tuple, piece: tuple[jax.Array, ...]) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        total, of_matrix, of_bias = sums
        part, targets, weights, *taught = piece
        # Logits in 16 bits, as the products are, take half the time to write and to read twice.
        low = _logits(part, small, bias, dtype=x.dtype)
        lse, nats = read_logits(low, targets)
        logits = low.astype(jnp.float32)
        slope = (weights * (1 + 2 * z_loss * lse))[..., None] * jnp.exp(logits - lse[..., None])
        aim, learned = jnp.where(_chosen(logits, targets), weights[..., None], 0.0), nats
        if teacher is not None:
            chances = jax.nn.softmax(teacher.logits(taught[0], small, bias, dtype=x.dtype).astype(jnp.float32))
            learned = learned + teacher.share * (lse - (chances * logits).sum(-1) - nats)
            aim = aim + teacher.share * (weights[..., None] * chances - aim)
        slope = slope - aim
        low = slope.astype(x.dtype)
        of_matrix = of_matrix + _product("...v,...e->ve", low, part, matrix)
        of_bias = None if bias is None else of_bias + slope.sum(tuple(range(slope.ndim - 1)))
        of_part = _product("...v,ve->...e", low, small, part).astype(x.dtype)
        total = total + ((learned + z_loss * jnp.square(lse)) * weights).sum()
        return (total, of_matrix, of_bias), (nats * weights, of_part)

    zeros = (jnp.zeros(()), jnp.zeros_like(matrix, jnp.float32), None if bias is None else jnp.zeros_like(bias))
    (total, of_matrix, of_bias), (nats, of_x) = _over(
        body, zeros, _cut((x, targets, weights, *_taught(teacher)), pieces)
    )
    return (total, _joined(nats)), (_joined(of_x), of_matrix.astype(matrix.dtype), of_bias)


def _backward(z_loss: float, pieces: int, kept: tuple, factors: tuple[jax.Array, jax.Array]) -> tuple:
    of_x, of_matrix, of_bias = kept
    factor = factors[0]
    return (
        (factor * of_x.astype(factor.dtype)).astype(of_x.dtype),
        factor * of_matrix,
        None if of_bias is None else factor * of_bias,
        None,
        None,
        None,
    )


_summed.defvjp(_forward, _backward)


def _taught(teacher: Teacher | None) -> tuple[jax.Array, ...]:
    return () if teacher is None else (jax.lax.stop_gradient(teacher.x),)


def _over(body: Callable[[Any, Any], tuple[Any, Any]], first: Any, pieces: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """Returns `jax.lax.scan(body, first, pieces)`, without a loop around a single piece."""
    if len(pieces[0]) > 1:
        return jax.lax.scan(body, first, pieces)
    last, made = body(first, jax.tree.map(lambda piece: piece[0], pieces))
    return last, jax.tree.map(lambda leaf: leaf[None], made)


def _logits(x: jax.Array, matrix: jax.Array, bias: jax.Array | None, *, dtype: Any = jnp.float32) -> jax.Array:
    logits = jnp.einsum("...e,ve->...v", x, matrix, preferred_element_type=dtype)
    return logits if bias is None else logits + along_last(bias, logits.ndim)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns logsumexp(logits) and -log softmax(logits) at the targets, (..) each of (.., V) and (..)."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    return lse, lse - jnp.where(_chosen(logits, targets), logits, 0.0).sum(axis=-1)


def read_logits(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the same as `cross_entropy`, in float32, but without a gradient."""
    wide = logits.astype(jnp.float32)
    if not reads_once():
        return cross_entropy(wide, targets)
    lse = _logsumexp_in_one_pass(wide)
    return lse, lse - pick_last(logits, targets).astype(jnp.float32)


def reads_once() -> bool:
    """Returns whether the logits are read once for their sum and once for their gradient: on a GPU, where that is a
    fifth of what the loss takes beside its products, and where no device has only a part of the vocabulary."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.are_all_axes_manual or mesh.shape.get("tensor", 1) == 1
    return jax.default_backend() == "gpu" and whole


def _logsumexp_in_one_pass(logits: jax.Array) -> jax.Array:
    """Returns logsumexp over the last axis, by a reduction that carries the largest logit so far and the sum of
    exponentials relative to it.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax" (arXiv 1805.02867).
    """

    def join(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (top, of_top), (other, of_other) = a, b
        less = jnp.exp(-jnp.abs(top - other))
        total = jnp.where(top >= other, of_top + of_other * less, of_other + of_top * less)
        return jnp.maximum(top, other), total

    lowest = jnp.asarray(
        jnp.finfo(logits.dtype).min, logits.dtype
    )  # not -inf, whose difference from itself is not a number
    ones, zero = jnp.ones_like(logits), jnp.zeros((), logits.dtype)
    top, total = jax.lax.reduce((logits, ones), (lowest, zero), join, (logits.ndim - 1,))
    return top + jnp.log(total)


def _chosen(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns a mask of the targets among the logits: a gather would need a pass of its own, and a layout."""
    return along_last(jnp.arange(logits.shape[-1], dtype=targets.dtype), logits.ndim) == targets[..., None]


def _product(subscripts: str, a: jax.Array, b: jax.Array, like: jax.Array) -> jax.Array:
    """Returns a product of 16 bits or more, summed in float32 and laid out as `like`."""
    layout = jax.typeof(like).sharding if is_explicit(like) else None
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32, out_sharding=layout)


def _cut(arrays: tuple[jax.Array, ...], pieces: int) -> tuple[jax.Array, ...]:
    """Returns each (B, L, ..) as (pieces, B, L / pieces, ..)."""
    return tuple(jnp.moveaxis(a.reshape(a.shape[0], pieces, -1, *a.shape[2:]), 1, 0) for a in arrays)


def _joined(pieces: jax.Array) -> jax.Array:
    """Returns (pieces, B, l, ..) as (B, L, ..)."""
    rows = jnp.moveaxis(pieces, 0, 1)
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])

"""From our parameters to a folder's tensors and back: one table of entries a model, used both ways.

An entry says which parameter is written as which tensors, and in what layout. Reading inverts the writing, so that a
folder's tensors are restored bit for bit, and the expected shapes are those that writing would give.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from odelm.errors import InputError

SHOWN = 5
"""How many problems an error lists before it only counts them."""


@dataclass(frozen=True)
class Layout:
    """How a parameter is laid out as tensors, and how they are put together again."""

    write: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    read: Callable[[tuple[int, ...], tuple[np.ndarray, ...]], np.ndarray]
    """Takes the parameter's shape and the tensors."""


def _flat(rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that makes a matrix (I, O) whose first axis merges the first `rows` axes."""
    return lambda x: x.reshape(int(np.prod(x.shape[:rows])), -1)


SAME = Layout(lambda x: (x,), lambda shape, tensors: tensors[0])
"""Vectors and embeddings."""

TRANSPOSED = Layout(lambda x: (x.T,), lambda shape, tensors: tensors[0].T)
"""A linear map (I, O) as torch's `Linear` holds it, (O, I)."""

MERGED_TRANSPOSED = Layout(lambda x: (_flat(2)(x).T,), lambda shape, tensors: tensors[0].T.reshape(shape))
"""The attention's output map (H, K, D) as (D, H K)."""

SPLIT_TRANSPOSED = Layout(
    lambda x: tuple(_flat(1)(x[:, i]).T for i in range(3)),
    lambda shape, tensors: np.stack([t.T.reshape(shape[0], *shape[2:]) for t in tensors], 1),
)
"""The three maps (D, 3, H, K) as three tensors (H K, D)."""

SPLIT = Layout(
    lambda x: tuple(row.reshape(-1) for row in x),
    lambda shape, tensors: np.stack([t.reshape(shape[1:]) for t in tensors]),
)
"""Their biases (3, H, K) as three vectors (H K,)."""


def _reshaped(shape: tuple[int, ...], tensors: tuple[np.ndarray, ...]) -> np.ndarray:
    return tensors[0].reshape(shape)


MERGED = Layout(lambda x: (_flat(2)(x),), _reshaped)
"""The attention's output map (H, K, D) as GPT-2's `Conv1D` holds it, (H K, D)."""

JOINED = Layout(lambda x: (_flat(1)(x),), _reshaped)
"""The three maps (D, 3, H, K) in one `Conv1D`, (D, 3 H K)."""

JOINED_BIAS = Layout(lambda x: (x.reshape(-1),), _reshaped)
"""Their biases (3, H, K) as one vector (3 H K,)."""


@dataclass(frozen=True)
class Entry:
    """One parameter, the tensors that it is written as, and their layout."""

    parameter: str
    tensors: tuple[str, ...]
    layout: Layout = SAME


def linear(parameter: str, tensor: str) -> list[Entry]:
    """Returns the entries of an `nnx.Linear` with bias that is a torch `Linear` in the folder."""
    return [
        Entry(f"{parameter}/kernel", (f"{tensor}.weight",), TRANSPOSED),
        Entry(f"{parameter}/bias", (f"{tensor}.bias",)),
    ]


def norm(parameter: str, tensor: str) -> list[Entry]:
    """Returns the entries of a LayerNorm."""
    return [Entry(f"{parameter}/scale", (f"{tensor}.weight",)), Entry(f"{parameter}/bias", (f"{tensor}.bias",))]


def attention(parameter: str, inputs: Sequence[str], output: str) -> list[Entry]:
    """Returns the entries of an `Attention` whose query, key and value maps are torch `Linear`s in the folder."""
    return [
        Entry(f"{parameter}/qkv/kernel", tuple(f"{name}.weight" for name in inputs), SPLIT_TRANSPOSED),
        Entry(f"{parameter}/qkv/bias", tuple(f"{name}.bias" for name in inputs), SPLIT),
        Entry(f"{parameter}/out/kernel", (f"{output}.weight",), MERGED_TRANSPOSED),
        Entry(f"{parameter}/out/bias", (f"{output}.bias",)),
    ]


def write(entries: Sequence[Entry], parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the tensors of all entries, float32."""
    tensors = {}
    for entry in entries:
        tensors |= zip(entry.tensors, entry.layout.write(np.asarray(parameters[entry.parameter])), strict=True)
    return tensors


def read(
    entries: Sequence[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, np.ndarray],
    *,
    place: str,
    implied_by: str,
) -> dict[str, np.ndarray]:
    """Returns the parameters by name, float32, of exactly these tensors.

    `shapes` are the parameters'. Raises InputError naming each tensor that is missing, unexpected or of another
    shape, with both shapes; `place` and `implied_by` say where the tensors are from and what determines the shapes.
    """
    expected = {}
    for entry in entries:
        shape = jax.ShapeDtypeStruct(shapes[entry.parameter], np.float32)
        expected |= zip(entry.tensors, jax.eval_shape(entry.layout.write, shape), strict=True)
    problems = [f"{name} is missing, shape {expected[name].shape}" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected, shape {tensors[name].shape}" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tensors[name].shape}, expected {expected[name].shape}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputError(
            f"the tensors of {place} are not those that its config.json implies: {'; '.join(problems[:SHOWN])}{more} "
            f"(config.json says {implied_by})"
        )
    return {
        entry.parameter: np.ascontiguousarray(
            entry.layout.read(
                shapes[entry.parameter], tuple(tensors[name].astype(np.float32) for name in entry.tensors)
            )
        )
        for entry in entries
    }

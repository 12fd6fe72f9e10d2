"""Converts a memory made with one plan for use with another: keys and values are addressed by depth time.

A prompt may cross the depth in fine steps and the tokens after it in coarse ones, or the other way round. Where a time
of the second plan is also one of the first, the keys and values are taken unchanged; between two times they are
interpolated, and outside all times the nearest are taken, which costs quality (docs/inference.md, "One memory, two
grids").
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from odelm.models.memory import Memory
from odelm.models.transformer import DepthPlan, SharedTransformer


def retimed(model: SharedTransformer, memory: Memory, source: DepthPlan, target: DepthPlan) -> Memory:
    """Returns the memory of the model's plan `source` as one of its plan `target`."""
    alike = [before.tableau == after.tableau for before, after in zip(source, target, strict=True)]
    parts = zip(memory.blocks, model.memory_times(source), model.memory_times(target), alike, strict=True)
    return dataclasses.replace(memory, blocks=tuple(_retimed(*part) for part in parts))


def _retimed(kept: Any, source: jax.Array, target: jax.Array, alike: bool) -> Any:
    """Returns one block's arrays with leading axes (N, R), made at times `source` (N, R), interpolated at times
    `target`.

    If the methods are `alike` each stage is read from the same stage, else from the first one, which sees the state
    itself.
    """
    stages = []
    for r in range(target.shape[1]):
        of = r if alike else 0
        lower, upper, weight = _neighbours(source[:, of], target[:, r])

        def at(leaf: jax.Array, of=of, lower=lower, upper=upper, weight=weight) -> jax.Array:
            before, after = (leaf[index, of].astype(jnp.float32) for index in (lower, upper))
            share = weight.reshape(-1, *[1] * (before.ndim - 1))
            return (before + share * (after - before)).astype(leaf.dtype)

        stages.append(jax.tree.map(at, kept))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *stages)


def _neighbours(times: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the indices in increasing `times` (N,) before and after each of `wanted` (M,), and the weight of the
    second: int32 (M,), int32 (M,), float32 (M,)."""
    last = times.shape[0] - 1
    lower = jnp.clip(jnp.searchsorted(times, wanted, side="right") - 1, 0, last)
    upper = jnp.minimum(lower + 1, last)
    gap = times[upper] - times[lower]
    return lower, upper, jnp.where(gap > 0, jnp.clip((wanted - times[lower]) / jnp.where(gap > 0, gap, 1), 0, 1), 0)

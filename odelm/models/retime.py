"""A memory made on one way across the depth, read on another: keys and values are addressed by depth time.

A prompt may cross the depth in fine steps and the tokens after it in coarse ones, or the other way round. Where the
times of the second plan are among those of the first its keys and values are taken as they are; between two times they
are interpolated, and outside them the nearest are taken, which costs quality (docs/inference.md, "One memory, two
grids").
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from odelm import ode
from odelm.models.memory import Memory
from odelm.models.transformer import DepthPlan


def retimed(memory: Memory, source: DepthPlan, target: DepthPlan) -> Memory:
    """Returns the memory of plan `source` as one of plan `target`; both are plans of the same model."""
    parts = zip(memory.blocks, source, target, strict=True)
    return dataclasses.replace(memory, blocks=tuple(_retimed(*part) for part in parts))


def _retimed(kept: Any, source: ode.Plan, target: ode.Plan) -> Any:
    """Returns arrays with leading axes (N, R) of one block, made at the times of `source`, at those of `target`.

    Stages are read from the same stages of a like method, else from first stages, which see the state itself.
    """
    alike = source.tableau == target.tableau
    stages = []
    for r in range(target.times.shape[1]):
        of = r if alike else 0
        lower, upper, weight = _neighbours(source.times[:, of], target.times[:, r])

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

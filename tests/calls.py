"""Calls of models as one program: operation by operation, a model takes several times as long."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def jitted(function: Callable[..., Any], *models: nnx.Module) -> Any:
    """Returns `function(*models)`, which may be any tree of arrays, computed by one jitted program."""
    split = [nnx.split(model) for model in models]

    def run(params: list[Any]) -> Any:
        return function(*(nnx.merge(graph, p) for (graph, _), p in zip(split, params, strict=True)))

    return jax.jit(run)([params for _, params in split])

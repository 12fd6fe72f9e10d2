"""Calls of modules as one program each: operation by operation, a model takes several times as long to compile."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx


def compiled(called: Any) -> Callable[..., Any]:
    """Returns what a module, or a bound method of one, computes, by a jitted program.

    Arrays among the arguments are traced, and all else is static: a second call with other numbers compiles nothing.
    """
    module, method = getattr(called, "__self__", called), getattr(called, "__name__", "__call__")
    graph, state = nnx.split(module)

    def call(*arguments: Any, **options: Any) -> Any:
        leaves, tree = jax.tree.flatten((arguments, options))
        arrays = [leaf if isinstance(leaf, jax.Array | np.ndarray | np.generic) else None for leaf in leaves]
        static = tuple(leaf if array is None else None for leaf, array in zip(leaves, arrays, strict=True))
        return _run(graph, method, tree, static, state, arrays)

    return call


def jitted(function: Callable[..., Any], *modules: nnx.Module) -> Any:
    """Returns `function(*modules)`, which may be any tree of arrays, computed by one jitted program."""
    split = [nnx.split(module) for module in modules]

    def run(states: list[Any]) -> Any:
        return function(*(nnx.merge(graph, state) for (graph, _), state in zip(split, states, strict=True)))

    return jax.jit(run)([state for _, state in split])


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(graph: nnx.GraphDef, method: str, tree: Any, static: tuple[Hashable, ...], state: Any, arrays: Any) -> Any:
    leaves = [value if array is None else array for value, array in zip(static, arrays, strict=True)]
    arguments, options = jax.tree.unflatten(tree, leaves)
    return getattr(nnx.merge(graph, state), method)(*arguments, **options)

"""Parameters by name: `blocks/0/attention/qkv/kernel`, the way from the model to the array."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


def name_of(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf of a tree of parameters, from its path in the tree."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return "/".join(keys[:-1] if keys[-1] == "value" else keys)


def parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """Returns every parameter of a module by its name."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(module, nnx.Param))
    return {name_of(path): leaf for path, leaf in leaves}


def with_parameters(module: Module, arrays: Mapping[str, Any]) -> Module:
    """Returns a copy of a module with these parameters in place of its own: all of them, and no others."""
    graph, state = nnx.split(module, nnx.Param)
    own = {name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    if own != arrays.keys():
        raise ValueError(f"the parameters {sorted(own ^ arrays.keys())} are not in both the module and the arrays")
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(lambda path, _: arrays[name_of(path)], state))

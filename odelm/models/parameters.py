"""Parameters by name, such as `blocks/0/attention/qkv/kernel`, and models rebuilt around them."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.models.lm import Classifier, Encoder
from odelm.models.transformer import SharedTransformer

Module = TypeVar("Module", bound=nnx.Module)
Model = TypeVar("Model", bound=SharedTransformer)


def name_of(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf of a tree of parameters, from its path in the tree."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return "/".join(keys[:-1] if keys[-1] == "value" else keys)


def parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """Returns every parameter of a module by its name."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(module, nnx.Param))
    return {name_of(path): leaf for path, leaf in leaves}


def parameter_bytes(module: nnx.Module) -> int:
    """Returns how many bytes the parameters of a module take, whatever their dtypes: those of a quantised model too."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in parameters(module).values())


def with_parameters(module: Module, arrays: Mapping[str, Any]) -> Module:
    """Returns a copy of a module with these parameters in place of its own: all of them, and no others."""
    graph, state = nnx.split(module, nnx.Param)
    own = {name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    if own != arrays.keys():
        raise ValueError(f"the parameters {sorted(own ^ arrays.keys())} are not in both the module and the arrays")
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(lambda path, _: arrays[name_of(path)], state))


def like(model: Model, config: ModelConfig, *, rngs: nnx.Rngs) -> Model:
    """Returns a newly initialised model of `config`, of the same class and with the same heads."""
    if isinstance(model, Classifier):
        return type(model)(config, outputs=model.head.out.out_features, rngs=rngs)
    if isinstance(model, Encoder):
        return type(model)(config, pooled=model.pool is not None, rngs=rngs)
    return type(model)(config, rngs=rngs)


def abstract_like(model: Model, config: ModelConfig) -> Model:
    """Returns the model that `like` returns, with shapes in place of its parameters."""
    return nnx.eval_shape(lambda: like(model, config, rngs=nnx.Rngs(0)))


def load_parameters(model: Model, arrays: Mapping[str, Any]) -> Model:
    """Returns a copy of the model with these parameters; those that are not named keep their values.

    Raises ValueError for a name or a shape that the model lacks.
    """
    current = parameters(model)
    for name, array in arrays.items():
        if name not in current or current[name].shape != array.shape:
            has = current[name].shape if name in current else None
            raise ValueError(f"parameter {name} has shape {array.shape}, but the model's is {has}")
    return with_parameters(model, current | {name: jnp.asarray(array) for name, array in arrays.items()})

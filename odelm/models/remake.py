"""A model made again with another config, and parameters moved from one to the other by name."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.models.lm import Classifier, Encoder
from odelm.models.parameters import parameters, with_parameters
from odelm.models.transformer import SharedTransformer

Model = TypeVar("Model", bound=SharedTransformer)


def remade(model: Model, config: ModelConfig, *, rngs: nnx.Rngs) -> Model:
    """Returns a newly initialised model of the same class and heads."""
    if isinstance(model, Classifier):
        return type(model)(config, outputs=model.head.out.out_features, rngs=rngs)
    if isinstance(model, Encoder):
        return type(model)(config, pooled=model.pool is not None, rngs=rngs)
    return type(model)(config, rngs=rngs)


def shapes_of(model: Model, config: ModelConfig) -> Model:
    """Returns what `remade` would, its parameters as shapes alone."""
    return nnx.eval_shape(lambda: remade(model, config, rngs=nnx.Rngs(0)))


def grafted(model: Model, arrays: Mapping[str, Any]) -> Model:
    """Returns a copy of the model with these parameters; those that are not named stay as they are.

    Raises ValueError for a name or a shape that the model has not.
    """
    own = parameters(model)
    for name, array in arrays.items():
        if name not in own or own[name].shape != array.shape:
            has = own[name].shape if name in own else None
            raise ValueError(f"parameter {name} has shape {array.shape}, but the model's is {has}")
    return with_parameters(model, own | {name: jnp.asarray(array) for name, array in arrays.items()})

"""A trained model whose predictions another one learns (`train.teacher`)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tokenizers import Tokenizer

from odelm import pretrained, sharding
from odelm.config import Config
from odelm.errors import InputError
from odelm.models import CausalLM, MaskedLM


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FrozenModel:
    """A model that is not trained, as a pytree: parameters that go into a program, and the structure that it is
    compiled for."""

    params: Any
    graph: nnx.GraphDef = dataclasses.field(metadata=dict(static=True))

    @property
    def model(self) -> Any:
        """The model; no gradient flows into it."""
        return nnx.merge(self.graph, jax.lax.stop_gradient(self.params))


def load_teacher(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> FrozenModel | None:
    """Returns the model of `train.teacher` on the devices of the mesh; None if there is none.

    Raises InputError for a model that cannot be read, of another kind, with other tokens, or of fewer positions than a
    row has tokens.
    """
    path = config.train.teacher
    if not path:
        return None
    model, _, own = pretrained.load(path, with_profile=False)
    if model.config.kind != config.model.kind or not isinstance(model, CausalLM | MaskedLM):
        raise InputError(f"train.teacher, {path}, is no {config.model.kind} with the head of a language model")
    if own is None or own.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"train.teacher, {path}, has other tokens than the run: train with --config.data.tokenizer set to the "
            "tokenizer.json that it was trained with"
        )
    if model.config.vocab_size != config.model.vocab_size:
        raise InputError(
            f"train.teacher, {path}, has model.vocab_size {model.config.vocab_size}, but the run has "
            f"{config.model.vocab_size}: expected the same"
        )
    if model.config.max_length < config.train.length:
        raise InputError(
            f"train.teacher, {path}, has {model.config.max_length} positions, but train.length is "
            f"{config.train.length}: shorten the rows"
        )
    graph, params = nnx.split(model, nnx.Param)
    layout = sharding.state_shardings(params, mesh)
    return FrozenModel(jax.tree.map(lambda leaf, place: jax.device_put(np.asarray(leaf), place), params, layout), graph)

"""The models that users create: causal and masked language models, and a classifier on the encoder."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.models import initialize
from odelm.models.embed import Readout
from odelm.models.transformer import SharedTransformer


class CausalLM(SharedTransformer):
    """Predicts the next token: float32 logits (B, L, V)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        _expect_kind(config, "decoder", "CausalLM")
        super().__init__(config, rngs=rngs)
        self.head = Readout(self.config, rngs=rngs)

    def readout(self, hidden: jax.Array) -> jax.Array:
        """Returns logits float32 (.., V) of hidden states (.., D)."""
        return self.head(hidden, self.embed.tokens[...])


class MaskedLM(SharedTransformer):
    """Predicts masked tokens: float32 logits (B, L, V); optionally whether two segments are in order."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        _expect_kind(config, "encoder", "MaskedLM")
        super().__init__(config, rngs=rngs)
        self.head = Readout(self.config, rngs=rngs)
        self.order = Pooled(self.config, 2, rngs=rngs) if config.sentence_order else None

    def readout(self, hidden: jax.Array) -> jax.Array:
        """Returns logits float32 (.., V) of hidden states (.., D), which may be only the masked ones."""
        return self.head(hidden, self.embed.tokens[...])

    def readout_order(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 (B, 2): logits of the two segments being in order and swapped."""
        if self.order is None:
            raise InputError("this model has no sentence-order head: create it with model.sentence_order=True")
        return self.order(hidden)


HEAD_KEY = 2**30
"""The number folded into a classifier's key for the dropout of its head: larger than any block's number."""


class Classifier(SharedTransformer):
    """Reads `outputs` numbers off the first position of an encoder: class logits, or with 1 a regression.

    The config option is `model.outputs`. The head is BERT's: `tanh(W h_0 + b)`, dropout, and a linear map.
    """

    def __init__(self, config: ModelConfig, *, outputs: int, rngs: nnx.Rngs):
        _expect_kind(config, "encoder", "Classifier")
        if outputs < 1:
            raise InputError(f"outputs is {outputs}, expected the number of classes, or 1 for a regression")
        super().__init__(dataclasses.replace(config, outputs=outputs, sentence_order=False), rngs=rngs)
        self.head = Pooled(self.config, outputs, rngs=rngs)

    @classmethod
    def from_encoder(cls, encoder: SharedTransformer, *, outputs: int, rngs: nnx.Rngs) -> "Classifier":
        """Returns a classifier with a copy of a pre-trained encoder's body, and of its pooler if it has one; the rest
        of the head is new."""
        model = cls(encoder.config, outputs=outputs, rngs=rngs)
        body = nnx.clone(encoder)
        model.embed, model.final_norm = body.embed, body.final_norm
        model.prelude, model.blocks, model.coda = body.prelude, body.blocks, body.coda
        if (pool := _pooler_of(body)) is not None:
            model.head.pool = pool
        return model

    def readout(self, hidden: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns float32 (B, outputs) of hidden states (B, L, D); `key` turns the head's dropout on."""
        return self.head(hidden, None if key is None else jax.random.fold_in(key, HEAD_KEY))


class Encoder(SharedTransformer):
    """An encoder without a head for its objective, such as a bare `AlbertModel`.

    Calling it gives BERT's pooled first position, float32 (B, D), if it has the pooler (`pooled`), else the hidden
    states (B, L, D).
    """

    def __init__(self, config: ModelConfig, *, pooled: bool, rngs: nnx.Rngs):
        _expect_kind(config, "encoder", "Encoder")
        super().__init__(config, rngs=rngs)
        self.pool = pooler(self.config, rngs=rngs) if pooled else None

    def readout(self, hidden: jax.Array) -> jax.Array:
        """Returns the output of a call, given hidden states (B, L, D)."""
        return hidden if self.pool is None else pool(self.pool, hidden)


class Pooled(nnx.Module):
    """BERT's pooler, `tanh(W h_0 + b)`, dropout, and a linear map of it; float32."""

    def __init__(self, config: ModelConfig, outputs: int, *, rngs: nnx.Rngs):
        self.pool = pooler(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)
        self.out = nnx.Linear(config.width, outputs, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)

    def __call__(self, hidden: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns float32 (B, outputs) of hidden states (B, L, D); `key` turns dropout on."""
        return self.out(self.dropout(pool(self.pool, hidden), deterministic=key is None, rngs=key))


def pooler(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns the linear map of BERT's pooler, newly initialised."""
    return nnx.Linear(config.width, config.width, kernel_init=initialize.matrix, rngs=rngs)


def pool(linear: nnx.Linear, hidden: jax.Array) -> jax.Array:
    """Returns `tanh(W h_0 + b)`, float32 (B, D), of hidden states (B, L, D)."""
    return jnp.tanh(linear(hidden[:, 0].astype(jnp.float32)))


def _pooler_of(encoder: SharedTransformer) -> nnx.Linear | None:
    """Returns the pooler that an encoder was trained with, None if it has none."""
    if isinstance(encoder, Classifier):
        return encoder.head.pool
    if isinstance(encoder, MaskedLM):
        return None if encoder.order is None else encoder.order.pool
    return encoder.pool if isinstance(encoder, Encoder) else None


def create(config: ModelConfig, *, rngs: nnx.Rngs) -> CausalLM | MaskedLM | Classifier:
    """Returns the model that the config describes, newly initialised: a classifier if it has `outputs`, else a language
    model."""
    if config.outputs:
        return Classifier(config, outputs=config.outputs, rngs=rngs)
    return (CausalLM if config.kind == "decoder" else MaskedLM)(config, rngs=rngs)


def _expect_kind(config: ModelConfig, kind: str, name: str) -> None:
    if config.kind != kind:
        raise InputError(f"{name} needs model.kind={kind!r}, but the config says {config.kind!r}")

"""Tokens to the initial state, and the state back to logits: factorised, tied or separate."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.models import initialize
from odelm.models.arrays import along_last, lookup
from odelm.models.feedforward import activate
from odelm.models.inputs import Inputs
from odelm.models.norm import Norm
from odelm.models.precision import compute_dtype, upcast_float16_on_cpu


def sinusoids(length: int, size: int) -> jax.Array:
    """Returns the fixed position features of Vaswani et al. 2017, section 3.5, float32 (length, size)."""
    rates = jnp.exp(-math.log(10_000.0) * jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * rates[None]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(length, size)


def sinusoid_table(length: int, size: int) -> jax.Array:
    """Returns the features at the scale of newly initialised embeddings, to which they are added."""
    return sinusoids(length, size) / math.sqrt(size)


class Embed(nnx.Module):
    """Sums token, position and type embeddings of size E, normalises them if asked, and projects to width D.

    ALBERT's factorisation (Lan et al. 2019, arXiv 1909.11942, section 3.1) is `embed_dim < width`. Sinusoidal positions
    are scaled to the embeddings' initial size; rotary ones are applied in the attention.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        E = config.embed_size
        self.positions, self.max_length = config.positions, config.max_length
        self.tokens = nnx.Param(initialize.embedding(rngs.params(), (config.vocab_size, E)))
        if config.positions == "learned":
            self.learned = nnx.Param(initialize.embedding(rngs.params(), (config.max_length, E)))
        if config.token_types:
            self.types = nnx.Param(initialize.embedding(rngs.params(), (config.token_types, E)))
        self.norm = Norm(config, E) if config.embed_norm else None
        self.factor = initialize.embedding_factor(config)
        self.dropout = nnx.Dropout(config.dropout)
        self.project = (
            nnx.Linear(E, config.width, use_bias=config.bias, kernel_init=initialize.matrix, rngs=rngs)
            if config.embed_dim is not None
            else None
        )

    def __call__(self, inputs: Inputs, key: jax.Array | None = None) -> jax.Array:
        """Returns the initial state, float32 (B, L, D); `key` turns dropout on.

        Positions that the inputs leave out are 0 to L - 1.
        """
        if inputs.embeddings is None:
            x = self.rows(jnp.asarray(inputs.tokens))
        else:
            x = jnp.asarray(inputs.embeddings).astype(jnp.float32)
        if hasattr(self, "types"):
            types = self.types[...]
            given = inputs.token_types
            x = x + (types[None, :1] if given is None else lookup(types, jnp.asarray(given)))
        if self.positions != "rotary":
            x = x + self._position_features(inputs)
        if self.factor != 1:
            x = self.factor * x
        if self.norm is not None:
            x = self.norm(x)
        x = self.dropout(x, deterministic=key is None, rngs=key)
        return x if self.project is None else self.project(x)

    def rows(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings of tokens (B, L), float32 (B, L, E); NaN for a token that has none."""
        return lookup(self.tokens[...], tokens)

    def _position_features(self, inputs: Inputs) -> jax.Array:
        """Returns what is added for the positions, float32 (1 or B, L, E)."""
        if self.positions == "learned":
            table = self.learned[...]
        else:
            table = sinusoid_table(self.max_length, self.tokens.shape[1])
        if inputs.positions is not None:
            return lookup(table, jnp.asarray(inputs.positions))
        # The gradient of a lookup is a scatter. The gradient of a broadcast is a sum over the batch, for which XLA on a
        # GPU lays out the whole state with the batch last, and copies it at every product.
        return lookup(table, jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape))


class Readout(nnx.Module):
    """Maps the state (.., D) to logits (.., V), through the transposed embedding or a matrix of its own.

    A decoder with a factorised embedding projects to E first. An encoder transforms first (dense, activation,
    norm) and adds a bias per token: the masked-language head of BERT and ALBERT.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, E = config.width, config.embed_size
        self.masked = config.kind == "encoder"
        self.dtype, self.factor = compute_dtype(config), initialize.embedding_factor(config)
        # A gate needs a layer of twice the size, which this head lacks.
        self.activation = "gelu_tanh" if config.activation == "swiglu" else config.activation
        if self.masked or config.embed_dim is not None:
            bias = self.masked or config.bias
            self.project = nnx.Linear(D, E, use_bias=bias, dtype=self.dtype, kernel_init=initialize.matrix, rngs=rngs)
        if self.masked:
            self.norm = Norm(config, E)
            self.bias = nnx.Param(jnp.zeros((config.vocab_size,), jnp.float32))
        if not config.tie_readout:
            self.tokens = nnx.Param(initialize.embedding(rngs.params(), (config.vocab_size, E)))

    def __call__(self, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        """Returns float32 logits (.., V); `embedding` (V, E) is used where the readout is tied."""
        x, matrix, bias = self.parts(hidden, embedding)
        logits = jnp.einsum("...e,ve->...v", x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)
        return logits if bias is None else logits + along_last(bias, logits.ndim)

    def parts(self, hidden: jax.Array, embedding: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns `x` (.., E), a float32 matrix (V, E) and a bias (V,) or None: the logits are `x matrix^T + bias`."""
        x = hidden.astype(self.dtype)
        if hasattr(self, "project"):
            x = self.project(x)
        if self.masked:
            x = self.norm(activate(x, self.activation))
        matrix = self.tokens[...] if hasattr(self, "tokens") else embedding
        if self.factor != 1:
            x = x / self.factor
        return upcast_float16_on_cpu(x), matrix, self.bias[...] if self.masked else None

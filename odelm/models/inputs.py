"""What a call is given, as one value: tokens or embeddings, and what is known of each."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from odelm.config import ModelConfig
from odelm.errors import InputError

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """B rows of L tokens, or of L embeddings in their place."""

    tokens: Array | None = None
    """int32 (B, L), from 0 to below the vocabulary's size."""
    embeddings: Array | None = None
    """float (B, L, E) in place of tokens, E the embedding's size (the width, unless it is factorised). They enter
    before positions and the embedding's norm, so that data other than tokens can cross the same depth."""
    positions: Array | None = None
    """int32 (B, L); None counts from 0, in each segment anew, and after a memory from its length."""
    mask: Array | None = None
    """bool (B, L), True at real tokens; None is all."""
    token_types: Array | None = None
    """int32 (B, L); None is 0."""
    segments: Array | None = None
    """int32 (B, L), non-decreasing along a row: the index of the document that a token belongs to. Documents of one row
    do not attend to each other."""

    @property
    def shape(self) -> tuple[int, int]:
        """B and L."""
        array = self.embeddings if self.tokens is None else self.tokens
        assert array is not None
        return array.shape[0], array.shape[1]

    def checked(self, config: ModelConfig) -> "Inputs":
        """Returns self; InputError for values that do not fit each other or the model."""
        if (self.tokens is None) == (self.embeddings is None):
            raise InputError("give either tokens or embeddings, and not both")
        if self.tokens is not None:
            _check_tokens(self.tokens)
        else:
            _check_embeddings(self.embeddings, config.embed_size)
        if self.shape[1] > config.max_length:
            raise InputError(
                f"the tokens are {self.shape[1]} long, but model.max_length is {config.max_length}: "
                "shorten them or raise it"
            )
        for name in ("positions", "mask", "token_types", "segments"):
            array = getattr(self, name)
            if array is not None and array.shape != self.shape:
                raise InputError(
                    f"the {name} are of shape {array.shape}, expected one for each token, {self.shape}: "
                    f"give a row of {name} for each row of tokens"
                )
        if self.token_types is not None and not config.token_types:
            raise InputError("token_types were given, but model.token_types is 0: the model has no embeddings for them")
        return self


def as_inputs(tokens: Array | Inputs, mask: Array | None, token_types: Array | None, segments: Array | None) -> Inputs:
    """Returns a call's arguments as one value."""
    if not isinstance(tokens, Inputs):
        return Inputs(tokens=tokens, mask=mask, token_types=token_types, segments=segments)
    if not (mask is token_types is segments is None):
        raise InputError("an Inputs was given, and a mask, token_types or segments beside it: put them into it")
    return tokens


def positions_within(segments: jax.Array) -> jax.Array:
    """Returns how far each token is from the first of its segment, int32 (B, L)."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _check_tokens(tokens: Array) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(
            f"the tokens are {tokens.dtype} of shape {tokens.shape}, expected whole numbers of shape (batch, length); "
            "embeddings go in as model(Inputs(embeddings=...))"
        )


def _check_embeddings(embeddings: Array | None, size: int) -> None:
    assert embeddings is not None
    if embeddings.ndim != 3 or embeddings.shape[2] != size or not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise InputError(
            f"the embeddings are {embeddings.dtype} of shape {embeddings.shape}, expected floats of shape "
            f"(batch, length, {size})"
        )

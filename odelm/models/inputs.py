"""The inputs of a call as one value: tokens or embeddings, and what is known about each of them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

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
    """float (B, L, E) in place of tokens, E the embedding's size (the width, unless it is factorised). Positions and
    the embedding's norm are applied to them as to tokens, so that data other than tokens can cross the same depth."""
    positions: Array | None = None
    """int32 (B, L); None counts from 0, anew in each segment, and after a memory continues from its length."""
    mask: Array | None = None
    """bool (B, L), True at real tokens; None is all."""
    token_types: Array | None = None
    """int32 (B, L); None is 0."""
    segments: Array | None = None
    """int32 (B, L), non-decreasing along a row: the index of the document that a token belongs to. Documents of one row
    do not attend to each other."""
    lengths: Array | None = None
    """int32 (B,), in place of a mask: how many real tokens each row begins with. Padding that is known to follow them
    costs less on a GPU, where attention then needs no mask."""

    @property
    def shape(self) -> tuple[int, int]:
        """B and L."""
        array = self.embeddings if self.tokens is None else self.tokens
        assert array is not None
        return array.shape[0], array.shape[1]

    @property
    def real(self) -> jax.Array | None:
        """bool (B, L), True at real tokens, whether a mask or lengths were given; None is all."""
        if self.lengths is None:
            return None if self.mask is None else jnp.asarray(self.mask, bool)
        return within(jnp.asarray(self.lengths), self.shape[1])

    def checked(self, config: ModelConfig) -> "Inputs":
        """Returns the inputs as arrays, the mask as bool; InputError for values that do not fit each other or the
        model.

        Values are checked where they are known. In traced code they are unknown: there an id without an embedding
        becomes NaN.
        """
        if (self.tokens is None) == (self.embeddings is None):
            raise InputError("give either tokens or embeddings, and not both")
        if self.token_types is not None and not config.token_types:
            raise InputError("token_types were given, but model.token_types is 0: the model has no embeddings for them")
        if self.mask is not None and self.lengths is not None:
            raise InputError("give either a mask or lengths, and not both")
        given = {name: as_array(name, value) for name, value in vars(self).items() if value is not None}
        inputs = Inputs(**given)
        if inputs.tokens is not None:
            _check_tokens(inputs.tokens, config.vocab_size)
        else:
            _check_embeddings(inputs.embeddings, config.embed_size)
        inputs._check_shapes(config)
        rows = {"token_types": config.token_types, "segments": None, "positions": None, "lengths": inputs.shape[1] + 1}
        if config.positions != "rotary":
            rows["positions"] = config.max_length
        for name, size in rows.items():
            if name in given:
                _check_ids(name, given[name], size)
        return inputs if inputs.mask is None else dataclasses.replace(inputs, mask=_as_mask(inputs.mask))

    def _check_shapes(self, config: ModelConfig) -> None:
        if self.shape[1] > config.max_length:
            raise InputError(
                f"the tokens are {self.shape[1]} long, but model.max_length is {config.max_length}: "
                "shorten them or raise it"
            )
        if self.lengths is not None and self.lengths.shape != self.shape[:1]:
            raise InputError(
                f"the lengths are of shape {self.lengths.shape}, expected one for each row, {self.shape[:1]}: a mask "
                "says it of each token"
            )
        for name in ("positions", "mask", "token_types", "segments"):
            array = getattr(self, name)
            if array is not None and array.shape != self.shape:
                raise InputError(
                    f"the {name} are of shape {array.shape}, expected one for each token, {self.shape}: "
                    f"give a row of {name} for each row of tokens"
                )


def as_inputs(tokens: Array | Inputs, mask: Array | None, token_types: Array | None, segments: Array | None) -> Inputs:
    """Returns a call's arguments as one value."""
    if not isinstance(tokens, Inputs):
        return Inputs(tokens=tokens, mask=mask, token_types=token_types, segments=segments)
    if not (mask is token_types is segments is None):
        raise InputError("an Inputs was given, and a mask, token_types or segments beside it: put them into it")
    return tokens


def within(lengths: jax.Array, places: int) -> jax.Array:
    """Returns which of L = `places` positions are before each row's length (B,), bool (B, L)."""
    return jnp.arange(places, dtype=jnp.int32)[None] < lengths[:, None]


def positions_within(segments: jax.Array) -> jax.Array:
    """Returns how far each token is from the first of its segment, int32 (B, L)."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return index[None] - jax.lax.cummax(jnp.where(starts, index[None], 0), axis=1)


def as_array(name: str, value: Any) -> Array:
    """Returns an array as it is, and numbers in lists as a NumPy array; InputError for anything else."""
    if isinstance(value, jax.Array | np.ndarray):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"the {name} are rows of different lengths: pad them, and give a mask") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"the {name} are {type(value).__name__}, expected an array or lists of numbers")
    return array.astype(np.int32) if array.dtype.kind in "iu" else array


def known(array: Array) -> np.ndarray | None:
    """Returns the values of an array; None if it is traced, or is on other processes."""
    if isinstance(array, np.ndarray):
        return array
    return np.asarray(array) if not isinstance(array, Tracer) and array.is_fully_addressable else None


def _check_tokens(tokens: Array, size: int) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(
            f"the tokens are {tokens.dtype} of shape {tokens.shape}, expected whole numbers of shape (batch, length); "
            "embeddings go in as model(Inputs(embeddings=...))"
        )
    _check_ids("tokens", tokens, size)


def _check_ids(name: str, ids: Array, size: int | None) -> None:
    """Raises InputError for ids that are not whole numbers or, as far as they are known, not from 0 to `size` - 1."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"the {name} are {ids.dtype}, expected whole numbers: give them as int32")
    values = None if size is None else known(ids)
    if values is None or size is None:
        return
    wrong = np.argwhere((values < 0) | (values >= size))
    if len(wrong):
        row, *place = wrong[0].tolist()
        where = f"in row {row}" + "".join(f" at place {number}" for number in place)
        because = f"the model has {size} embeddings for them" if place else "a row cannot be longer than the tokens"
        raise InputError(f"the {name} have {values[tuple(wrong[0])]} {where}, expected 0 to {size - 1}: {because}")


def _as_mask(mask: Array) -> Array:
    """Returns a mask of 0 and 1 as bool; InputError for a mask with other values."""
    if mask.dtype == bool:
        return mask
    values = known(mask) if jnp.issubdtype(mask.dtype, jnp.integer) else np.full((), 2)
    if values is not None and not np.isin(values, (0, 1)).all():
        raise InputError(
            f"the mask is {mask.dtype}, expected bool, or whole numbers 0 and 1: True or 1 at real tokens, and nothing "
            "that is added to attention's logits"
        )
    return mask != 0


def _check_embeddings(embeddings: Array | None, size: int) -> None:
    assert embeddings is not None
    if embeddings.ndim != 3 or embeddings.shape[2] != size or not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise InputError(
            f"the embeddings are {embeddings.dtype} of shape {embeddings.shape}, expected floats of shape "
            f"(batch, length, {size})"
        )

"""Modules with 8-bit matrices, which `odelm.quantize` puts in place of a model's own.

A matrix has a scale for each of its outputs, which multiplies the result of the product. If inputs have 8 bits too,
they have a scale for each token, or one for all, and the product is of 8-bit values, summed in 32 bits.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.models.arrays import along_last, lookup
from odelm.models.embed import Embed, Readout
from odelm.models.precision import upcast_float16_on_cpu


@dataclass(frozen=True)
class Kind:
    """How a model is quantised."""

    name: str
    dtype: str
    """The dtype of the matrices, and of the inputs if these are quantised."""
    inputs: Literal["float", "dynamic", "static"]
    """Whether inputs are not quantised, have a scale for each token, computed at run time, or have one calibrated
    scale."""

    @property
    def largest(self) -> float:
        """The largest value: int8 is used symmetrically, from -127 to 127."""
        return 127.0 if self.dtype == "int8" else float(jnp.finfo(self.dtype).max)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("int8", "int8", "float"),
        Kind("fp8", "float8_e4m3fn", "float"),
        Kind("int8_dynamic", "int8", "dynamic"),
        Kind("fp8_dynamic", "float8_e4m3fn", "dynamic"),
        Kind("int8_static", "int8", "static"),
        Kind("fp8_static", "float8_e4m3fn", "static"),
    )
}


def scale_of(x: jax.Array, axes: tuple[int, ...], kind: Kind) -> jax.Array:
    """Returns the scale that maps the largest of `x` over `axes` to the kind's largest value, float32, with `axes` of
    size 1."""
    largest = jnp.abs(x.astype(jnp.float32)).max(axes, keepdims=True)
    return jnp.where(largest > 0, largest / kind.largest, 1.0)


def rounded(x: jax.Array, scale: jax.Array, kind: Kind) -> jax.Array:
    """Returns `x / scale` rounded to the nearest values of 8 bits; what is too large is clipped to the largest value.

    `scale` has as many axes as `x`, or none.
    """
    x = jnp.clip(x.astype(jnp.float32) / scale, -kind.largest, kind.largest)
    return (jnp.round(x) if kind.dtype == "int8" else x).astype(kind.dtype)


def restored(values: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns `values * scale` in float32; `scale` has as many axes as `values`, or none."""
    return values.astype(jnp.float32) * scale


def product(
    x: jax.Array,
    matrix: jax.Array,
    scale: jax.Array,
    *,
    over: tuple[tuple[int, ...], tuple[int, ...]],
    kind: Kind,
    input_scale: jax.Array | None,
) -> jax.Array:
    """Returns the product of inputs and a quantised matrix, float32.

    Args:
        x: inputs of a float dtype (.., I), where I may be several axes.
        matrix: (I, O) or (O, I), of `kind.dtype`.
        scale: float32 (O), where O may be several axes.
        over: the axes of `x` and of `matrix` that are summed over.
        input_scale: float32 (), for inputs whose scale is calibrated.
    """
    of_x, of_matrix = (tuple(axis % array.ndim for axis in axes) for axes, array in zip(over, (x, matrix), strict=True))
    dimensions = ((of_x, of_matrix), ((), ()))
    if kind.inputs == "float":
        # Without the barrier XLA takes the conversion out of the loop over the depth: a copy of every matrix in float.
        x, matrix = jax.lax.optimization_barrier((upcast_float16_on_cpu(x), matrix))
        y = jax.lax.dot_general(x, matrix.astype(x.dtype), dimensions, preferred_element_type=jnp.float32)
        return y * along_last(scale, y.ndim)
    of_inputs = scale_of(x, of_x, kind) if input_scale is None else input_scale
    x, matrix = jax.lax.optimization_barrier((rounded(x, of_inputs, kind), matrix))
    wide = jnp.int32 if kind.dtype == "int8" else jnp.float32
    y = jax.lax.dot_general(x, matrix, dimensions, preferred_element_type=wide).astype(jnp.float32)
    if of_inputs.ndim:
        kept = [size for axis, size in enumerate(of_inputs.shape) if axis not in of_x]
        of_inputs = of_inputs.reshape(*kept, *(1,) * scale.ndim)
    return y * of_inputs * along_last(scale, y.ndim)


class QuantizedLinear(nnx.Module):
    """`x W + b` with a quantised `W`, in place of an `nnx.Linear` or of an `nnx.LinearGeneral` over the last axes.

    `kernel` (I, O) has 8 bits, `scale` is float32 (O), `bias` float32 (O) or None, and `input_scale` float32 () or
    None; I and O may be several axes each.
    """

    def __init__(self, linear: nnx.Linear | nnx.LinearGeneral, kind: Kind):
        # A map in float32 reads a time, an embedding or a single state, which are not quantised.
        self.kind = kind if linear.dtype is not None else dataclasses.replace(kind, inputs="float")
        self.dtype = jnp.dtype(linear.dtype or jnp.float32)
        self.inputs = len(linear.axis) if isinstance(linear, nnx.LinearGeneral) else 1
        shape = linear.kernel.shape
        self.kernel = nnx.Param(jnp.zeros(shape, kind.dtype))
        self.scale = nnx.Param(jnp.ones(shape[self.inputs :], jnp.float32))
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])
        self.input_scale = nnx.Param(jnp.ones((), jnp.float32)) if self.kind.inputs == "static" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (.., O) from (.., I), in the dtype of the model's matrix products."""
        over = tuple(range(-self.inputs, 0)), tuple(range(self.inputs))
        x = x.astype(self.dtype)
        y = product(
            x, self.kernel[...], self.scale[...], over=over, kind=self.kind, input_scale=_value(self.input_scale)
        )
        return (y if self.bias is None else y + along_last(self.bias[...], y.ndim)).astype(self.dtype)


class QuantizedEmbed(Embed):
    """The embedding of a model with a tied readout: `tokens` (V, E) has 8 bits, and `scale` is float32 (V,)."""

    def __init__(self, config: ModelConfig, kind: Kind, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.tokens = nnx.Param(self.tokens[...].astype(kind.dtype))
        self.scale = nnx.Param(jnp.ones(self.tokens.shape[:1], jnp.float32))

    def rows(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings of tokens (B, L), float32 (B, L, E); NaN for a token without an embedding."""
        # 8-bit dtypes have no NaN to fill with, or lose it, so the scale of a token without an embedding is NaN.
        return restored(lookup(self.tokens[...], tokens, fill=0), lookup(self.scale[...][:, None], tokens))


class QuantizedReadout(Readout):
    """A readout whose matrix (V, E), its own or the embedding's, has 8 bits; `scale` is float32 (V,)."""

    def __init__(self, config: ModelConfig, kind: Kind, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.kind = kind
        if not config.tie_readout:
            self.tokens = nnx.Param(self.tokens[...].astype(kind.dtype))
        self.scale = nnx.Param(jnp.ones((config.vocab_size,), jnp.float32))
        self.input_scale = nnx.Param(jnp.ones((), jnp.float32)) if kind.inputs == "static" else None

    def __call__(self, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        """Returns float32 logits (.., V) of hidden states (.., D); `embedding` (V, E) is used if the readout is
        tied."""
        x, matrix, bias = super().parts(hidden, embedding)
        over = (-1,), (1,)
        logits = product(x, matrix, self.scale[...], over=over, kind=self.kind, input_scale=_value(self.input_scale))
        return logits if bias is None else logits + along_last(bias, logits.ndim)

    def parts(self, hidden: jax.Array, embedding: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns the same as `Readout.parts`, in float32, with inputs and matrix rounded as in a call."""
        x, matrix, bias = super().parts(hidden, embedding)
        if self.kind.inputs != "float":
            own = _value(self.input_scale)
            scale = scale_of(x, (x.ndim - 1,), self.kind) if own is None else own
            x = restored(rounded(x, scale, self.kind), scale)
        return x.astype(jnp.float32), restored(matrix, self.scale[...][:, None]), bias


def _value(param: nnx.Param | None) -> jax.Array | None:
    return None if param is None else param[...]

"""Per-layer low-rank corrections to a shared block, interpolated over depth time.

A shared matrix `W` becomes `W + A(t) B(t)`, with a product of low rank: at each whole time of the block's stretch the
product is the low-rank residual of the layer that was there, and between two such times it is interpolated linearly, so
that the field stays continuous. The vectors (biases, norms) keep their whole residual, which costs next to nothing.
Source: Bae et al. 2024, "Relaxed Recursive Transformers" (arXiv 2410.20672, section 2.3); as a function of time it is
ours. It depends on `t` only, so `odelm.ode.make_plan` computes it for a whole grid ahead of the first step.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.models import initialize
from odelm.models.arrays import along_last
from odelm.models.heads import input_sizes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Delta:
    """What is added to one linear map: `x @ down @ up + bias`; float32 (I, 2 rank), (2 rank, O) and (O,) or None."""

    down: jax.Array
    up: jax.Array
    bias: jax.Array | None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (.., O) of (.., I), in the dtype of `x`."""
        y = x @ self.down.astype(x.dtype) @ self.up.astype(x.dtype)
        return y if self.bias is None else y + along_last(self.bias.astype(x.dtype), y.ndim)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NormDelta:
    """What is added to the scale (D,) and the bias (D,) of one norm."""

    scale: jax.Array
    bias: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockDelta:
    """What is added to each part of a block at one time."""

    inputs: dict[str, Delta]
    """The deltas of the input maps of attention, by the maps' names."""
    out: Delta
    up: Delta
    down: Delta
    norm1: NormDelta
    norm2: NormDelta | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """A time between two layers: their indices, int32, and the weight of the second, float32."""

    first: jax.Array
    second: jax.Array
    weight: jax.Array


class LowRank(nnx.Module):
    """The residuals of one matrix at `layers` times; zero at initialisation."""

    def __init__(self, layers: int, inputs: int, outputs: int, rank: int, *, bias: bool, rngs: nnx.Rngs):
        self.down = nnx.Param(initialize.matrix(rngs.params(), (layers, inputs, rank)))
        self.up = nnx.Param(jnp.zeros((layers, rank, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((layers, outputs), jnp.float32)) if bias else None

    def __call__(self, place: Place) -> Delta:
        down = jnp.concatenate([self.down[...][place.first], self.down[...][place.second]], axis=1)
        first, second = self.up[...][place.first], self.up[...][place.second]
        up = jnp.concatenate([(1 - place.weight) * first, place.weight * second], axis=0)
        return Delta(down, up, None if self.bias is None else between(self.bias[...], place))


class NormTable(nnx.Module):
    """The residuals of one norm at `layers` times; zero at initialisation."""

    def __init__(self, layers: int, size: int, *, bias: bool):
        self.scale = nnx.Param(jnp.zeros((layers, size), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((layers, size), jnp.float32)) if bias else None

    def __call__(self, place: Place) -> NormDelta:
        return NormDelta(between(self.scale[...], place), None if self.bias is None else between(self.bias[...], place))


class LayerDelta(nnx.Module):
    """All residuals of a block whose stretch of time begins at `start`: one layer at every whole time of the
    stretch."""

    def __init__(self, config: ModelConfig, *, start: float, two_norms: bool, rngs: nnx.Rngs):
        D, F, rank, bias = config.width, config.feedforward_size, config.layer_rank, config.bias
        self.start = start
        self.layers = config.core // config.groups
        widened = 2 * F if config.activation == "swiglu" else F
        maps = {
            name: LowRank(self.layers, D, size, rank, bias=bias, rngs=rngs)
            for name, size in input_sizes(config).items()
        }
        self.qkv, self.query, self.key_value = (maps.get(name) for name in ("qkv", "query", "key_value"))
        self.out = LowRank(self.layers, D, D, rank, bias=bias, rngs=rngs)
        self.up = LowRank(self.layers, D, widened, rank, bias=bias, rngs=rngs)
        self.down = LowRank(self.layers, F, D, rank, bias=bias, rngs=rngs)
        self.norm1 = NormTable(self.layers, D, bias=bias)
        self.norm2 = NormTable(self.layers, D, bias=bias) if two_norms else None

    def __call__(self, t: jax.Array) -> BlockDelta:
        """Returns the residuals at `t`; past the last layer's time they are constant."""
        local = jnp.clip(t - self.start, 0.0, self.layers - 1.0)
        first = jnp.floor(local).astype(jnp.int32)
        place = Place(first, jnp.minimum(first + 1, self.layers - 1), local - first.astype(local.dtype))
        norm2 = None if self.norm2 is None else self.norm2(place=place)
        maps = {"qkv": self.qkv, "query": self.query, "key_value": self.key_value}
        return BlockDelta(
            {name: low_rank(place=place) for name, low_rank in maps.items() if low_rank is not None},
            self.out(place=place),
            self.up(place=place),
            self.down(place=place),
            self.norm1(place=place),
            norm2,
        )


def between(table: jax.Array, place: Place) -> jax.Array:
    """Returns the row of `table` (layers, n) at a place, interpolated linearly."""
    return (1 - place.weight) * table[place.first] + place.weight * table[place.second]

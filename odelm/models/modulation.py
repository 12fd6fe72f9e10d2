"""Time modulation: how the block depends on its depth time.

One block used at every depth has to do what different layers would; conditioning it on the time `t` recovers most of
what sharing loses. A small network maps a few features of `t / depth` to a scale and a shift for each of the block's
norms and a gate for each of its branches, after the adaptive norm of diffusion transformers (Peebles and Xie 2022,
arXiv 2212.09748). Two things matter here:

- the features are *low* frequencies. With high ones the block is only right at the times it was trained on,
  and a grid between them breaks it; with low ones it is a smooth field that any grid may sample;
- it depends on `t` only, so it is computed for a whole grid before the first step (`odelm.ode.make_plan`).

With `wide_modulation` it also scales queries, keys, values and hidden units, so that the block computes a different
mixture at every time; these scales fold into the columns of the matrices before them.

The last layer starts at zero, so a modulated block starts as the plain block.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.config import ModelConfig
from odelm.models import initialize
from odelm.models.arrays import along_last
from odelm.models.heads import input_maps, input_sizes

FREQUENCIES = 4
HIDDEN = 64


def time_features(tau: jax.Array) -> jax.Array:
    """Returns sin and cos of `pi/2 k tau`, k = 1..4, for `tau` in [0, 1]: at most one period, float32 (.., 8)."""
    tau = jnp.asarray(tau, jnp.float32)[..., None]
    angles = along_last(jnp.pi / 2 * jnp.arange(1, FREQUENCIES + 1, dtype=jnp.float32), tau.ndim) * tau
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Modulation(nnx.Module):
    """Maps a time to `rows` vectors of size D, all zero at initialisation; float32 throughout.

    `first` is the unit of depth that is the block's time 0: the features are those of `(first + t) / depth`.
    """

    def __init__(self, config: ModelConfig, rows: int, *, first: int = 0, rngs: nnx.Rngs):
        self.first, self.depth = first, config.depth
        self.rows = rows
        self.hidden = nnx.Linear(2 * FREQUENCIES, HIDDEN, kernel_init=initialize.matrix, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.out = nnx.Linear(HIDDEN, rows * config.width, kernel_init=zeros, rngs=rngs)
        self.config = config
        scales = sum(input_sizes(config).values()) + config.feedforward_size
        self.wide = nnx.Linear(HIDDEN, scales, kernel_init=zeros, rngs=rngs) if config.wide_modulation else None

    def __call__(self, t: jax.Array) -> jax.Array:
        """Returns float32 (rows, D) for a scalar time."""
        return self.out(self._features(t)).reshape(self.rows, -1)

    def scales(self, t: jax.Array) -> dict[str, jax.Array] | None:
        """Returns the factors on the output of each input map of attention, by the map's name, and on the `hidden`
        units (F,).

        Their shapes are those of `odelm.models.heads.input_maps`; None if not `wide`.
        """
        if self.wide is None:
            return None
        rest, scales, sizes = 1 + self.wide(self._features(t)), {}, input_sizes(self.config)
        for name, shape in input_maps(self.config).items():
            scales[name], rest = rest[: sizes[name]].reshape(shape), rest[sizes[name] :]
        return scales | {"hidden": rest}

    def _features(self, t: jax.Array) -> jax.Array:
        return jax.nn.silu(self.hidden(time_features((self.first + t) / self.depth)))

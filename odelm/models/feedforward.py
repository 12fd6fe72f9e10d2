"""The feed-forward branch: one hidden layer of size F, plain or gated."""

import jax
from flax import nnx

from odelm.config import ACTIVATIONS, ModelConfig
from odelm.models import initialize
from odelm.models.arrays import scaled
from odelm.models.precision import compute_dtype
from odelm.models.residual import Delta


class FeedForward(nnx.Module):
    """`W2 act(W1 x)`; with SwiGLU `W2 (silu(Wg x) * W1 x)` (Shazeer 2020, arXiv 2002.05202).

    `relu2` is the squared ReLU (So et al. 2021, arXiv 2109.08668).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.width, config.feedforward_size
        dtype = compute_dtype(config)
        self.activation = config.activation
        up = 2 * F if config.activation == "swiglu" else F
        self.up = nnx.Linear(D, up, use_bias=config.bias, dtype=dtype, kernel_init=initialize.matrix, rngs=rngs)
        self.down = nnx.Linear(
            F, D, use_bias=config.bias, dtype=dtype, kernel_init=initialize.branch_output(config), rngs=rngs
        )

    def __call__(
        self,
        x: jax.Array,
        up_delta: Delta | None = None,
        down_delta: Delta | None = None,
        *,
        hidden_scale: jax.Array | None = None,
    ) -> jax.Array:
        """Returns (.., D) for `x` (.., D). The deltas are added to the two linear maps; hidden units are multiplied by
        `hidden_scale`."""
        up = self.up(x)
        if up_delta is not None:
            up = up + up_delta(x.astype(up.dtype))
        # Only `up` is kept for the gradient. On a GPU XLA then computes a GELU in the product before it.
        inner = jax.checkpoint(lambda x, scale: scaled(activate(x, self.activation), scale))(up, hidden_scale)
        down = self.down(inner)
        return down if down_delta is None else down + down_delta(inner)


def activate(x: jax.Array, name: str) -> jax.Array:
    """Applies an activation of `odelm.config.ACTIVATIONS`; swiglu halves the last axis."""
    match name:
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)
        case "relu2":
            return jax.numpy.square(jax.nn.relu(x))
        case "silu":
            return jax.nn.silu(x)
        case "swiglu":
            gate, value = jax.numpy.split(x, 2, axis=-1)
            return jax.nn.silu(gate) * value
    raise ValueError(f"activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}")

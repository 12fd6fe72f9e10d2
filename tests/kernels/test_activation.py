import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odelm.config.model import ACTIVATIONS
from odelm.models.kernels.activation import activated

EXPECTED = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,
    "silu": jax.nn.silu,
}


def test_kernels_have_every_activation():
    assert {*EXPECTED, "swiglu"} == set(ACTIVATIONS)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_activation_is_that_of_the_model(name):
    x = jnp.linspace(-15, 15, 100_001, dtype=jnp.float32)
    np.testing.assert_allclose(activated(x, name), EXPECTED[name](x), atol=1e-6, rtol=1e-6)

import jax.numpy as jnp
import numpy as np
import pytest

from odelm.config.model import ACTIVATIONS
from odelm.models.feedforward import activate
from odelm.models.kernels.activation import activated

OF_ONE_NUMBER = sorted({*ACTIVATIONS} - {"swiglu"})


@pytest.mark.parametrize("name", OF_ONE_NUMBER)
def test_an_activation_is_that_of_the_model(name):
    x = jnp.linspace(-15, 15, 100_001, dtype=jnp.float32)
    np.testing.assert_allclose(activated(x, name), activate(x, name), atol=1e-6, rtol=1e-6)

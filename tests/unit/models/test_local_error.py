"""The local error of a step against the same step taken through the whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odelm.models import Inputs
from odelm.models.local_error import local_errors
from tests.calls import compiled, jitted

MODELS = {
    "pre": dict(),
    "post": dict(norm_placement="post"),
    "groups": dict(groups=2),
    "ends": dict(depth=6, prelude=1, coda=1),
    "lanes": dict(lanes=2),
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_error_is_that_of_one_step_from_full_depths_state(options, make_model, tokens):
    model = make_model(dtype="float32", **options)
    config = model.config
    core, share = config.core, config.core // config.groups
    found = np.asarray(jax.jit(lambda: local_errors(model, Inputs(tokens)))())
    assert found.shape == (core, core + 1)
    steps = np.array([[i < j <= (i // share + 1) * share for j in range(core + 1)] for i in range(core)])
    np.testing.assert_array_equal(np.isfinite(found), steps)
    for i in range(core):
        # A unit step is full depth's own; what is left is rounding, squared.
        assert found[i, i + 1] < 1e-11
    assert found[0, 2] > 1e-6, "larger steps must matter for this to test anything"


def test_two_steps_to_the_end_are_those_of_the_model(make_model, tokens):
    """The states before the last norm, which post-norm models lack."""
    model = make_model(dtype="float32", norm_placement="post")
    full = compiled(model.encode)(tokens)
    errors = jitted(lambda model: local_errors(model, Inputs(tokens)), model)
    for i in range(3):
        jumped = compiled(model.encode)(tokens, grid=[*range(i + 1), 4])
        wanted = jnp.square(jumped - full).sum() / jnp.square(full).sum()
        # float32 sums of two hundred terms, of differences of a few per cent of the state.
        assert float(errors[i, 4]) == pytest.approx(float(wanted), rel=1e-3)

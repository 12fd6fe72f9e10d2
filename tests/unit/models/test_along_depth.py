"""The norms along the depth are those of the states, one unit after the other."""

import jax
import numpy as np
import pytest

from odelm.models import Inputs
from odelm.models.along_depth import norms_along_depth
from tests.calls import compiled


@pytest.mark.parametrize(
    "options", [dict(), dict(depth=6, prelude=1, coda=1, groups=2, norm_placement="post"), dict(lanes=2)]
)
def test_norms_are_those_of_the_states(options, make_model, tokens):
    model = make_model(**options)
    config, h = model.config, model.embed(Inputs(tokens))
    states, slopes = jax.jit(lambda: norms_along_depth(model, Inputs(tokens)))()
    assert states.shape == slopes.shape == (config.depth,)
    if config.lanes > 1:
        # The lanes are equal at first.
        np.testing.assert_allclose(states[0], np.sqrt(np.square(h).mean()), rtol=1e-5)
        assert np.all(slopes > 0)
        return
    blocks = [(block, 0) for block in model.prelude]
    blocks += [(model.blocks[t * config.groups // config.core], t) for t in range(config.core)]
    blocks += [(block, 0) for block in model.coda]
    for unit, (block, t) in enumerate(blocks):
        after = compiled(block)(h, np.float32(t))
        np.testing.assert_allclose(states[unit], np.sqrt(np.square(h).mean()), rtol=1e-4)
        np.testing.assert_allclose(slopes[unit], np.sqrt(np.square(after - h).mean()), rtol=1e-4)
        h = after

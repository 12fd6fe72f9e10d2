"""Plans in one shape against each plan on its own."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from odelm.models import Inputs
from odelm.models.stretches import in_one_shape

ROWS = np.random.default_rng(0).integers(0, 13, (2, 9)).astype(np.int32)
# The same float32 arithmetic, fused differently.
CLOSE = dict(rtol=1e-5, atol=1e-5)
MODELS = {
    "ends": (dict(depth=6, prelude=1, coda=1), (4, 2, 1), "euler"),
    "two stages": (dict(), (4, 1), "heun"),
    "post, groups": (dict(norm_placement="post", groups=2), (4, 2), "euler"),
    "shared keys": (dict(kv_span=2), (4, 3, 1), "euler"),
    "lanes, encoder": (dict(kind="encoder", lanes=2), (4, 2), "euler"),
}


@pytest.mark.parametrize("options, counts, solver", MODELS.values(), ids=MODELS)
def test_one_program_crosses_in_any_number_of_steps(make_model, options, counts, solver):
    model = make_model(**{"dtype": "float32", **options})
    plans = [model.plan(steps=count, solver=solver) for count in counts]
    graph, params = nnx.split(model)
    run: Any = jax.jit(lambda params, plan: nnx.merge(graph, params).run(Inputs(ROWS), plan)[0])
    shaped = in_one_shape(plans)
    together = [run(params, plan) for plan in shaped]
    assert run._cache_size() == 1
    for plan, found in zip(plans, together, strict=True):
        np.testing.assert_allclose(found, run(params, plan), **CLOSE)
    assert np.abs(np.asarray(together[0] - together[-1])).max() > 1e-3, "step counts must differ"


def test_plans_of_one_shape_are_left_as_they_are(make_model):
    plans = [make_model().plan(steps=2), make_model().plan(grid=[0, 1, 4])]
    assert [plan[0].count for plan in in_one_shape(plans)] == [None, None]
    assert in_one_shape([]) == []

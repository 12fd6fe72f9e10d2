"""A memory gives what one pass gives for models, grids, methods and cuts that are drawn, not listed."""

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from odelm.errors import InputError
from odelm.models import Inputs
from tests.math.test_memory import ATOL, outcomes

SHAPES = st.fixed_dictionaries(
    dict(
        norm=st.sampled_from(["rmsnorm", "layernorm"]),
        norm_placement=st.sampled_from(["pre", "post"]),
        parallel_branches=st.booleans(),
        positions=st.sampled_from(["rotary", "learned", "sinusoidal"]),
        kv_heads=st.sampled_from([1, 2]),
        wide_modulation=st.booleans(),
        inner_blocks=st.sampled_from([1, 2]),
        lanes=st.sampled_from([1, 2]),
        groups=st.sampled_from([1, 2]),
        prelude=st.sampled_from([0, 1]),
        coda=st.sampled_from([0, 1]),
    )
)


@st.composite
def calls(draw) -> dict:
    """Options of a plan over a core of four units in one group or two."""
    inside = draw(st.sets(st.sampled_from([0.5, 1.0, 1.5, 2.5, 3.0]), max_size=2))
    return dict(grid=sorted({0.0, 2.0, 4.0} | inside), solver=draw(st.sampled_from(["euler", "heun", "midpoint"])))


CUTS = st.sets(st.integers(1, 7), min_size=1, max_size=2).map(lambda cuts: tuple(sorted(cuts)))


def drawn(make_model, options: dict):
    """Returns the model of drawn options, with a core of four units; rejects those that do not go together."""
    try:
        return make_model(depth=4 + options["prelude"] + options["coda"], **options)
    except InputError:
        reject()


def check(make_model, options: dict, call: dict, cuts: tuple[int, ...], seed: int) -> None:
    model = drawn(make_model, options)
    tokens = np.random.default_rng(seed).integers(0, 13, (2, 8), dtype=np.int32)
    whole, found = outcomes(model, Inputs(tokens), cuts, call)
    np.testing.assert_allclose(found, whole, rtol=0, atol=3 * ATOL)


@given(SHAPES, calls(), CUTS, st.integers(0, 99))
@settings(max_examples=2)
def test_a_few_models(make_model, options, call, cuts, seed):
    check(make_model, options, call, cuts, seed)


@pytest.mark.thorough
@given(SHAPES, calls(), CUTS, st.integers(0, 99))
@settings(max_examples=15)
def test_many_models(make_model, options, call, cuts, seed):
    check(make_model, options, call, cuts, seed)

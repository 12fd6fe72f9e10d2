"""Dropout is off without a key, a function of the key with one, and of time within one integration."""

import jax
import numpy as np
import pytest
from flax import nnx

from odelm import ode, rng
from odelm.models import BlockField
from odelm.models.field import key_at
from tests.thorough import few


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_dropout_follows_the_key(make_model, tokens, placement):
    graph, params = nnx.split(make_model(dropout=0.3, norm_placement=placement))
    run = jax.jit(lambda params, key: nnx.merge(graph, params)(tokens, key=key))
    first, again, other = (run(params, rng.key(0, "dropout", step)) for step in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    off = run(params, None)
    assert np.abs(first - off).max() > 0.01
    without, params = nnx.split(make_model(dropout=0.0, norm_placement=placement))
    plain = jax.jit(lambda params: nnx.merge(without, params)(tokens))(params)
    np.testing.assert_array_equal(off, plain)


@pytest.mark.parametrize("part", ["embedding", "block"])
def test_each_part_drops_by_itself(make_model, tokens, part):
    model = nnx.clone(make_model(dropout=0.3))
    silenced = model.blocks[0] if part == "embedding" else model.embed
    silenced.dropout.rate = 0.0
    graph, params = nnx.split(model)
    run = jax.jit(lambda params, key: nnx.merge(graph, params)(tokens, steps=1, key=key))
    assert np.abs(run(params, rng.key(0, "dropout")) - run(params, None)).max() > 0.01


def test_dropout_differs_from_step_to_step(make_model):
    """The block has no time modulation here, so only the mask can tell the times apart."""
    block = make_model(dropout=0.3, time_modulation=False).blocks[0]
    field = BlockField(block, key=rng.key(0, "dropout"))
    h = np.random.default_rng(0).standard_normal((1, 5, 16)).astype(np.float32)
    assert np.abs(field(np.float32(0), h) - field(np.float32(1), h)).max() > 0.01
    np.testing.assert_array_equal(field(np.float32(1), h), field(np.float32(1), h))


BOTH = [("pre", name) for name in ode.SOLVERS] + [("post", "euler")]


@pytest.mark.parametrize("placement, solver", few(BOTH, ("pre", "heun"), ("post", "euler")))
def test_both_integrations_see_the_same_dropout(make_model, placement, solver):
    graph, params = nnx.split(make_model(dropout=0.3, norm_placement=placement).blocks[0])
    h = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)

    def run(integrate, key):
        field = lambda params: BlockField(nnx.merge(graph, params), key=key)  # noqa: E731
        return jax.jit(lambda params, h: integrate(field(params), h, np.array([0, 0.7, 1.9, 4]), solver=solver))(
            params, h
        )

    key = rng.key(0, "dropout")
    scan = run(ode.integrate, key)
    # Three steps of at most twelve stages, whose times Diffrax rounds otherwise, about 200 roundings of 6e-8 of a state
    # of order 5; another mask differs by 0.1.
    np.testing.assert_allclose(scan, run(ode.integrate_diffrax, key), rtol=0, atol=10 * 200 * 6e-8)
    assert np.abs(scan - run(ode.integrate, rng.key(0, "dropout", 1))).max() > 0.1


def test_the_key_is_that_of_the_time_however_it_was_rounded():
    key = rng.key(0, "dropout")
    bits = lambda t: tuple(jax.random.key_data(key_at(key, np.float32(t))).tolist())  # noqa: E731
    shares = {stage for solver in ode.SOLVERS for stage in ode.get_tableau(ode.get_solver(solver)).c}
    times = sorted({start + size * share for start in (0.0, 1.5, 7.0) for size in (0.7, 1, 4) for share in shares})
    for t in times:
        near = [
            np.nextafter(np.nextafter(np.float32(t), to, dtype=np.float32), to, dtype=np.float32) for to in (-9, 99)
        ]
        assert {bits(t)} == {bits(other) for other in near}, t
    assert len({bits(t) for t in np.arange(0, 12, 0.01)}) == 1200

"""What a state may be, the same for all three integrations, and what is no field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odelm
from odelm import ode
from odelm.errors import InputError
from odelm.models import BlockField
from tests.thorough import few


def decay(t, h):
    return jax.tree.map(lambda x: -x, h)


RUNS = {
    "scan": lambda h0: ode.integrate(decay, h0, [0, 1, 2], solver="heun"),
    "diffrax": lambda h0: ode.integrate_diffrax(decay, h0, [0, 1, 2], solver="heun"),
    "plan": lambda h0: ode.follow_diffrax(decay, h0, ode.make_diffrax_plan(decay, [0, 1, 2], solver="heun")),
    "adaptive": lambda h0: ode.integrate_adaptive(decay, h0, 0.0, 2.0, tolerance=1e-2)[0],
}
STATES = {
    "3.0": 3.0, "3": 3, "True": True, "NumPy": np.arange(3), "JAX": jnp.arange(3), "floats": np.ones(2),
    "a dict": {"a": 1, "b": jnp.ones(2)}, "{}": {}, "[]": [], "None": None, "of size 0": np.zeros((0,)),
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("h0", few(STATES, "3", "True", "[]"))
def test_numbers_become_floats(run, h0):
    floats = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), h0)
    found, expected = jax.jit(lambda: (run(h0), run(floats)))()
    assert jax.tree.structure(found) == jax.tree.structure(h0)
    for one, other, start in zip(*map(jax.tree.leaves, (found, expected, floats)), strict=True):
        assert one.dtype == jnp.float32 and one.shape == np.shape(start)
        np.testing.assert_array_equal(one, other)
        # Two Heun steps of size 1 leave a quarter; exp(-2) is 0.135.
        assert np.all(np.abs(one) <= 0.26 * np.abs(start))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_floats_keep_their_dtype(run, dtype):
    assert jax.eval_shape(run, jnp.ones(2, dtype)).dtype == dtype


@pytest.mark.parametrize("options", [dict(), dict(inner_blocks=2)])
def test_a_block_and_a_model_are_no_fields(make_model, options):
    model = make_model(**options)
    block, h = model.blocks[0], jnp.ones((1, 4, 16))
    for integrate in (
        lambda field: odelm.integrate(field, h, [0, 2, 4]),
        lambda field: ode.integrate_diffrax(field, h, [0, 2, 4]),
        lambda field: ode.integrate_adaptive(field, h, 0.0, 4.0, tolerance=0.1),
        lambda field: ode.make_plan(field, [0, 2, 4]),
        lambda field: ode.make_diffrax_plan(field, [0, 2, 4]),
    ):
        with pytest.raises(InputError, match=rf"a {type(block).__name__} is no field.*BlockField\(block\)"):
            integrate(block)
        with pytest.raises(InputError, match=r"a CausalLM is no field.*BlockField\(model\.blocks\[0\]\)"):
            integrate(model)
    assert jax.eval_shape(lambda: odelm.integrate(BlockField(block), h, [0, 2, 4])).shape == h.shape

"""The scan over a fixed grid and Diffrax's own integration of it give the same values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from odelm import ode
from odelm.models import BlockField, View
from odelm.models.view import rotary_angles
from tests.thorough import few

GRID = np.array([0.0, 0.3, 0.4, 1.0, 1.5])


@dataclasses.dataclass(frozen=True, eq=False)
class Field:
    """A time-dependent nonlinear field on a dict of two arrays, with parameters; its own Euler step is damped."""

    weights: jax.Array

    def condition(self, t):
        return {"sin": jnp.sin(3 * t), "t": t}

    def increment(self, condition, h):
        mixed = jnp.tanh(self.weights @ h["a"] + condition["sin"])
        return {"a": mixed - 0.5 * h["a"], "b": condition["t"] * h["b"].T + mixed.sum()}

    def step(self, condition, h, dt):
        return jax.tree.map(lambda y, k: (y + dt * k) / (1 + dt / 2), h, self.increment(condition, h))

    def __call__(self, t, h):
        return self.increment(self.condition(t), h)


def arguments() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 3)), {"a": rng.standard_normal(3), "b": rng.standard_normal((2, 2))}


def value_and_gradients(integrate, solver, **options):
    def total(weights, h0):
        end = integrate(Field(weights), h0, GRID, solver=solver, **options)
        return jnp.sum(jnp.sin(end["a"])) + jnp.sum(jnp.cos(end["b"]) * jnp.arange(4.0).reshape(2, 2)), end

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(*arguments())


def assert_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected)


@pytest.mark.parametrize("solver", few(list(ode.SOLVERS), "heun"))
def test_values_and_gradients_agree_on_a_pytree(x64, solver):
    scan = value_and_gradients(ode.integrate, solver)
    diffrax = value_and_gradients(ode.integrate_diffrax, solver)
    # Four steps of at most 13 stages of about 10 operations, each rounded to 1.1e-16, come to 6e-14; the gradient
    # amplifies that by less than 10.
    assert_close(scan, diffrax, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [dict(unroll=True), dict(unroll=2), dict(remat="nothing_saveable")])
def test_unrolling_and_rematerialisation_change_nothing(x64, options):
    assert_close(
        value_and_gradients(ode.integrate, "heun", **options),
        value_and_gradients(ode.integrate, "heun"),
        rtol=1e-13,  # the same operations, fused differently: a few hundred roundings of 1.1e-16
        atol=1e-13,
    )


# The gradients through solvers of several stages were compared above; a block's take long to compile.
@pytest.mark.parametrize(
    "placement, solver, gradients",
    few(
        [("pre", "euler", True), ("pre", "heun", False), ("pre", "tsit5", False), ("post", "euler", True)],
        ("pre", "heun", False),
        ("post", "euler", True),
    ),
)
def test_values_and_gradients_agree_on_a_block(make_model, placement, solver, gradients):
    graph, params = nnx.split(make_model(norm_placement=placement).blocks[0])
    h0 = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    mask, angles = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], bool), rotary_angles(np.arange(5), 8, 10_000.0)

    def result(integrate):
        def total(params, h0):
            end = integrate(
                BlockField(nnx.merge(graph, params), View(angles, mask)), h0, np.array([0, 0.5, 2, 4]), solver=solver
            )
            return jnp.mean(jnp.sin(end)), end

        both = jax.value_and_grad(total, argnums=(0, 1), has_aux=True) if gradients else total
        return jax.tree.leaves(jax.jit(both)(params, h0))

    # Three steps of up to six blocks, each of a dozen chained sums of up to 24 terms: of the order of 200 roundings
    # of 6e-8, relative to the largest entry of each array.
    for actual, expected in zip(result(ode.integrate), result(ode.integrate_diffrax), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=200 * 6e-8 * np.abs(expected).max())

"""Every solver converges at its order, on a linear, a nonlinear and a time-dependent field with known solutions."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from odelm import ode

END = 2.0
MATRIX = np.array([[-0.5, 2.0], [-2.0, -0.5]])
START = {"linear": np.array([1.0, 0.5]), "nonlinear": np.array(0.2), "timed": np.array(1.0)}
EXACT = {
    "linear": scipy.linalg.expm(END * MATRIX) @ START["linear"],
    "nonlinear": np.array(1 / (1 + 4 * math.exp(-4 * END))),
    "timed": np.array(math.exp(math.sin(3 * END))),
}


def field(t, h):
    y = h["nonlinear"]
    return {"linear": MATRIX @ h["linear"], "nonlinear": 4 * y * (1 - y), "timed": 3 * jnp.cos(3 * t) * h["timed"]}


# Order and the coarser number of steps. Halving a step of size s changes the slope from p by about s times a ratio
# of error constants; the counts make s small enough for that to be below 0.4. Order 8 meets rounding before that:
# its slope is still above 8 by up to 0.9, which tells it from 7 and 9 all the same.
ORDERS = {
    "euler": (1, 256),
    "midpoint": (2, 128),
    "heun": (2, 128),
    "ralston": (2, 128),
    "bosh3": (3, 64),
    "rk4": (4, 128),
    "tsit5": (5, 64),
    "dopri5": (5, 64),
    "dopri8": (8, 12),
}


def test_every_solver_is_measured():
    assert set(ORDERS) == set(ode.SOLVERS)


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(x64, solver):
    order, steps = ORDERS[solver]

    def errors(n):
        end = jax.jit(lambda h: ode.integrate(field, h, np.linspace(0, END, n + 1), solver=solver))(START)
        return {name: float(np.abs(end[name] - EXACT[name]).max()) for name in EXACT}

    coarse, fine = errors(steps), errors(2 * steps)
    slopes = {name: math.log2(coarse[name] / fine[name]) for name in EXACT}
    # 4e-15 is some 20 roundings of numbers of order one: below it the error is no longer the method's.
    assert all(error > 4e-15 for error in fine.values()), f"rounding hides the order: {fine}"
    excess = 0.9 if order == 8 else 0.4
    assert all(-0.4 < slope - order < excess for slope in slopes.values()), f"slopes {slopes}, expected {order}"


@dataclass(frozen=True)
class Circle:
    """Rotation of a unit vector at the rate `1 + cos(t) / 2`, put back on the circle after each step."""

    def condition(self, t):
        return 1 + jnp.cos(t) / 2

    def increment(self, rate, h):
        return rate * jnp.stack([-h[1], h[0]])

    def step(self, rate, h, dt):
        moved = h + dt * self.increment(rate, h)
        return moved / jnp.linalg.norm(moved)

    def __call__(self, t, h):
        return self.increment(self.condition(t), h)


def test_a_projected_step_converges_at_order_one_and_stays_on_the_manifold(x64):
    angle = END + math.sin(END) / 2
    exact = np.array([math.cos(angle), math.sin(angle)])

    def error(n):
        grid = np.linspace(0, END, n + 1)
        end = jax.jit(lambda h: ode.integrate(Circle(), h, grid))(np.array([1.0, 0.0]))
        assert abs(float(jnp.linalg.norm(end)) - 1) < 1e-15 * 4
        return float(np.abs(end - exact).max())

    # The rate changes with time, so the leading error is that of a left Riemann sum, linear in the step of 1/64;
    # the next term is smaller by that factor.
    assert abs(math.log2(error(128) / error(256)) - 1) < 0.1

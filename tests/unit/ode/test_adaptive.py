"""Steps chosen by tolerance: accuracy, the number of evaluations, and running out of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odelm import ode
from odelm.errors import InputError
from tests.thorough import few


@pytest.mark.parametrize("solver", few(["midpoint", "bosh3", "dopri5"], "bosh3"))
def test_tolerance_is_reached_and_buys_accuracy(solver):
    def run(tolerance):
        end, evaluations = ode.integrate_adaptive(
            lambda t, h: -h + jnp.cos(t), jnp.float32(0), 0.0, 3.0, tolerance=tolerance, solver=solver, max_steps=1024
        )
        return abs(float(end) - (np.cos(3.0) + np.sin(3.0) - np.exp(-3.0)) / 2), int(evaluations)

    (loose_error, few), (tight_error, many) = run(1e-2), run(1e-5)
    # The tolerance bounds a step's error at tolerance * (1 + |h|), and h stays below 1. The field contracts, so errors
    # of earlier steps fade: the sum over the steps within the last unit of time (fewer than 10) bounds it.
    assert loose_error < 20 * 1e-2 and tight_error < 20 * 1e-5
    assert many > few


# At rate 100 a tenth of the interval is a step that is rejected, perhaps more than once: a "first same as last"
# method then evaluates its first stage anew.
@pytest.mark.parametrize(
    "solver, rate",
    few([("heun", 0.1), ("bosh3", 0.1), ("heun", 100.0), ("bosh3", 100.0), ("tsit5", 100.0)], ("bosh3", 100.0)),
)
def test_evaluations_are_counted(solver, rate):
    calls = []

    def field(t, h):
        def record(t):
            calls.append(float(t))
            return np.float32(0)

        return -rate * h + jax.pure_callback(record, jax.ShapeDtypeStruct((), jnp.float32), t)

    end, evaluations = ode.integrate_adaptive(field, jnp.ones(2), 0.0, 1.0, tolerance=1e-2, solver=solver)
    jax.block_until_ready(end)
    assert int(evaluations) == len(calls)
    assert (calls.count(0.0) > 1) == (rate == 100.0), "the stiff case rejects the first step, the other does not"


def test_evaluations_on_a_pytree_are_an_int32_scalar_under_jit():
    solve = jax.jit(
        lambda h: ode.integrate_adaptive(lambda t, h: jax.tree.map(jnp.negative, h), h, 0.0, 1.0, tolerance=1e-2)
    )
    end, evaluations = solve({"a": jnp.ones((2, 3)), "b": jnp.bfloat16(1)})
    assert (evaluations.shape, evaluations.dtype) == ((), jnp.int32)
    assert (end["a"].shape, end["b"].dtype) == ((2, 3), jnp.bfloat16)


def test_the_first_step_can_be_set():
    field, seen = (lambda t, h: -h), []
    for first_step in (None, 1.0):
        end, evaluations = ode.integrate_adaptive(
            field, jnp.float32(1), 0.0, 1.0, tolerance=1.0, solver="heun", first_step=first_step
        )
        seen.append((float(end), int(evaluations)))
    assert seen[1] == (0.5, 2)  # one step of Heun's method: 1 - 1 + 1/2
    assert seen[0] != seen[1]


def test_running_out_of_steps_says_so():
    def solve(h):
        return ode.integrate_adaptive(lambda t, h: -h, h, 0.0, 2.0, tolerance=1e-6, max_steps=2)[0]

    message = "2 steps did not reach t1 at tolerance 1e-06: raise max_steps or the tolerance"
    with pytest.raises(RuntimeError, match=message):
        solve(jnp.ones(2))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.jit(solve)(jnp.ones(2)).block_until_ready()


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_a_solver_without_error_estimate_is_refused(solver):
    with pytest.raises(InputError, match="has no error estimate.*try heun"):
        ode.integrate_adaptive(lambda t, h: h, jnp.ones(2), 0.0, 1.0, tolerance=1e-2, solver=solver)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
def test_a_bad_tolerance_is_refused(tolerance):
    with pytest.raises(InputError, match="the tolerance is .*, expected a positive number"):
        ode.integrate_adaptive(lambda t, h: h, jnp.ones(2), 0.0, 1.0, tolerance=tolerance)

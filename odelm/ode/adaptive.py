"""Steps chosen by an error estimate: Diffrax's PID controller in place of a fixed grid."""

from typing import Any, TypeVar, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from odelm.errors import InputError
from odelm.ode.diffrax_path import as_term
from odelm.ode.plan import Field, as_state, check_field, rounded_like
from odelm.ode.solver import Solver, full_tableau, get_solver, has_error_estimate

State = TypeVar("State")


def integrate_adaptive(
    field: Field,
    h0: State,
    t0: float,
    t1: float,
    *,
    tolerance: float,
    solver: Solver = "bosh3",
    first_step: float | None = None,
    max_steps: int = 256,
) -> tuple[State, jax.Array]:
    """Integrates from `t0` to `t1` in steps chosen by a PID controller.

    Args:
        tolerance: bounds the estimated error of a step, relative and absolute alike.
        first_step: the size tried first; None is a tenth of the interval.
        max_steps: the most steps attempted, rejected ones included.

    Returns the state and the number of evaluations of the field, an int32 scalar that counts those of rejected
    steps too. Raises InputError for a solver without an error estimate, and a RuntimeError (under `jax.jit` its
    subclass `jax.errors.JaxRuntimeError`) when `max_steps` do not reach `t1`.
    """
    check_field(field)
    solver, h0 = get_solver(solver), as_state(h0)
    _check(solver, tolerance)
    solution = diffrax.diffeqsolve(
        as_term(field, h0),
        solver,
        t0=t0,
        t1=t1,
        dt0=(t1 - t0) / 10 if first_step is None else first_step,
        y0=h0,
        saveat=diffrax.SaveAt(t1=True, controller_state=True),
        stepsize_controller=_CountingController(rtol=tolerance, atol=tolerance),
        max_steps=max_steps,
        throw=False,
    )
    end = rounded_like(jax.tree.map(lambda y: y[-1], solution.ys), h0)
    return eqx.error_if(
        (end, _evaluations(solution, full_tableau(solver))),
        solution.result != diffrax.RESULTS.successful,
        f"{max_steps} steps did not reach t1 at tolerance {tolerance:g}: raise max_steps or the tolerance",
    )


def _check(solver: diffrax.AbstractSolver, tolerance: float) -> None:
    """Raises InputError for a solver without an error estimate, and for a tolerance that is not positive."""
    if not has_error_estimate(solver):
        raise InputError(
            f"{type(solver).__name__} has no error estimate, so it cannot choose its own steps; "
            "try heun, bosh3, tsit5 or dopri5"
        )
    if not tolerance > 0:
        raise InputError(f"the tolerance is {tolerance}, expected a positive number such as 1e-2")


def _evaluations(solution: diffrax.Solution, tableau: diffrax.ButcherTableau) -> jax.Array:
    """Returns how many stages were evaluated, int32, the shared stages of "first same as last" methods once."""
    steps = solution.stats["num_steps"]
    if not tableau.fsal:
        return steps * tableau.num_stages
    _, first_attempts, _ = cast(tuple, solution.controller_state)
    return steps * (tableau.num_stages - 1) + first_attempts


class _CountingController(diffrax.PIDController):
    """A PID controller that counts the attempts at the first step.

    "First same as last" methods take a step's first stage from the step before it. Before a step is accepted there is
    no stage to take, so each attempt at the first step costs one evaluation more than later ones.
    """

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):  # pyright: ignore
        t1, state = super().init(terms, t0, t1, y0, dt0, args, func, error_order)
        return t1, (state, jnp.int32(0), jnp.bool_(False))

    def adapt_step_size(  # pyright: ignore
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        state, attempts, accepted = controller_state
        keep, *times_and_jump, state, result = super().adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, cast(Any, state)
        )
        return keep, *times_and_jump, (state, jnp.where(accepted, attempts, attempts + 1), accepted | keep), result

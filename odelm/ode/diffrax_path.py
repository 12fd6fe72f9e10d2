"""Diffrax's own integration of a fixed grid: the independent reference for the scan, and the way to use any other
solver.

It compiles more slowly and supports no memory, but takes every solver that Diffrax has, implicit ones too.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import diffrax
import jax
import jax.numpy as jnp

from odelm.errors import InputError
from odelm.ode.plan import Field, Grid, Plan, SteppingField, as_state, as_times, check_field, rounded_like
from odelm.ode.solver import OwnStep, Solver, Tableau, get_solver, stages_of

State = TypeVar("State")


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class PortableSolver:
    """A Diffrax solver as a pytree that compiled functions accept: its tolerances are leaves, all else is structure."""

    solver: diffrax.AbstractSolver

    def tree_flatten(self) -> tuple[list[Any], Any]:
        leaves, structure = jax.tree.flatten(self.solver)
        numbers = [leaf for leaf in leaves if _is_number(leaf)]
        return numbers, (structure, tuple(None if _is_number(leaf) else leaf for leaf in leaves))

    @classmethod
    def tree_unflatten(cls, aux: Any, numbers: Any) -> "PortableSolver":
        structure, rest = aux
        numbers = iter(numbers)
        return cls(jax.tree.unflatten(structure, [next(numbers) if leaf is None else leaf for leaf in rest]))


def make_diffrax_plan(field: Field, grid: Grid, *, solver: Solver = "euler") -> Plan:
    """Returns the plan by which `diffeqsolve` walks a grid, for `follow_diffrax`; the arguments are `make_plan`'s.

    Its conditions are empty, and its times are those at which steps start: Diffrax evaluates the field where it chooses
    to.
    """
    check_field(field)
    solver = get_solver(solver)
    grid = as_times(grid)
    times = jnp.broadcast_to(grid[:-1, None], (len(grid) - 1, stages_of(solver)))
    return Plan(jnp.diff(grid), times, None, PortableSolver(solver), Tableau(a=(), b=(), c=()))


def follow_diffrax(field: Field, h0: State, plan: Plan) -> State:
    """Integrates `h0` along a plan of `make_diffrax_plan`."""
    h0, starts = as_state(h0), plan.times[:, 0]
    grid = jnp.append(starts, starts[-1] + plan.sizes[-1])
    return _walk(field, h0, grid, plan.solver.solver)


def integrate_diffrax(field: Field, h0: State, grid: Grid, *, solver: Solver = "euler") -> State:
    """The same as `odelm.ode.integrate`, through `diffrax.diffeqsolve`: slower to compile, for any Diffrax solver.

    A state below float32 is rounded where the field sees it and at the end, not once a step.
    """
    check_field(field)
    return _walk(field, as_state(h0), as_times(grid), get_solver(solver))


def as_term(field: Field, h0: Any) -> diffrax.ODETerm:
    """Returns the field for Diffrax, which keeps a 16-bit state in float32; the field sees it in its own dtype."""
    return diffrax.ODETerm(lambda t, h, _: rounded_like(field(t, rounded_like(h, h0)), h))


def _walk(field: Field, h0: State, grid: jax.Array, solver: diffrax.AbstractSolver) -> State:
    if isinstance(solver, diffrax.AbstractImplicitSolver) and not _has_tolerances(solver):
        raise InputError(
            f"{type(solver).__name__} takes the tolerance of its root finder from an adaptive controller, and a fixed "
            "grid has none: give root_finder=optimistix.Newton(rtol=1e-3, atol=1e-3)"
        )
    solution = diffrax.diffeqsolve(
        as_term(field, h0),
        _bound(solver, field),
        t0=grid[0],
        t1=grid[-1],
        dt0=None,
        y0=h0,
        stepsize_controller=diffrax.StepTo(ts=grid),
        max_steps=len(grid) - 1,
    )
    return rounded_like(jax.tree.map(lambda y: y[-1], solution.ys), h0)


def _bound(solver: diffrax.AbstractSolver, field: Field) -> diffrax.AbstractSolver:
    """Returns the solver that steps by the field's own rule, or plain Euler where the field has none."""
    if not isinstance(solver, OwnStep):
        return solver
    if not isinstance(field, SteppingField):
        return diffrax.Euler()
    return OwnStep(lambda t, h, dt: field.step(field.condition(t), h, dt))


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, float | jax.Array)


def _has_tolerances(solver: Any) -> bool:
    return _is_number(getattr(solver.root_finder, "rtol", None))

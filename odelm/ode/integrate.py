"""The idea of the project: a stack of layers is the integration of `dh/dt = f(t, h)` over depth time.

`integrate` crosses a fixed grid in one `lax.scan`. With Euler's method and unit steps that is the ordinary
residual network `h <- h + f(t, h)`, bit for bit if compiled alike (a rolled scan against an unrolled loop may
differ by rounding); with fewer, larger steps it is the same model, cheaper.
`integrate_adaptive` lets Diffrax choose the steps from a tolerance, and `integrate_diffrax` walks a fixed
grid through `diffrax.diffeqsolve`, the independent path that the scan is tested against.

A field is any callable `field(t, h)` that returns the derivative of `h`, a pytree of the same structure.
A `ConditionedField` splits off what depends on `t` alone, which is then computed for the whole grid at once,
ahead of the scan (`plan`), and can be kept from one call to the next.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from odelm.errors import InputError, nearest
from odelm.ode.grid import Times, increasing
from odelm.ode.solver import (
    ProjectedEuler,
    Solver,
    evaluations,
    full_tableau,
    get_solver,
    get_tableau,
    has_error_estimate,
)

State = TypeVar("State")
Condition = Any
Grid = Sequence[float] | np.ndarray | jax.Array
Field = Callable[[Any, Any], Any]


@runtime_checkable
class ConditionedField(Protocol):
    """A field whose dependence on time goes through a condition: `field(t, h) = increment(condition(t), h)`."""

    def condition(self, t: jax.Array) -> Condition: ...

    def increment(self, condition: Condition, h: Any) -> Any: ...

    def __call__(self, t: jax.Array, h: Any) -> Any: ...


@runtime_checkable
class ProjectedField(ConditionedField, Protocol):
    """A field that can also take a whole step of size `dt` and put the state back where it belongs."""

    def project(self, condition: Condition, h: Any, dt: jax.Array) -> Any: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """What an integration needs besides field and state: step sizes, and the field's condition at each stage."""

    sizes: jax.Array
    """Step sizes, float32 (N,)."""
    conditions: Condition
    """Each leaf has leading axes (N, R), R the solver's stages."""
    solver: diffrax.AbstractSolver = dataclasses.field(metadata=dict(static=True))

    @property
    def evaluations(self) -> int:
        """How often following the plan evaluates the field."""
        return evaluations(self.solver, len(self.sizes))


def plan(field: Field, grid: Grid, *, solver: Solver = "euler") -> Plan:
    """Computes everything that does not depend on the state, for `follow`.

    `grid` is float (N + 1,), increasing. Raises InputError for another one, as far as its values are known, and for
    a solver that cannot walk a fixed grid.
    """
    solver = get_solver(solver)
    offsets = (0.0,) if isinstance(solver, ProjectedEuler) else get_tableau(solver).c
    grid = _times(grid)
    sizes = jnp.diff(grid)
    times = grid[:-1, None] + sizes[:, None] * jnp.asarray(offsets, grid.dtype)
    condition = field.condition if isinstance(field, ConditionedField) else lambda t: t
    return Plan(sizes, jax.vmap(jax.vmap(condition))(times), solver)


def follow(field: Field, h0: State, plan: Plan, *, unroll: int | bool = 1, remat: str | None = None) -> State:
    """Integrates `h0` along a plan. `unroll` is that of `lax.scan`; `remat` names a checkpoint policy.

    Arithmetic is float32 inside a step; the state keeps the dtype it came in, rounded once a step.
    """
    step = _step_function(field, plan.solver)

    def body(h: State, xs: tuple[jax.Array, Condition]) -> tuple[State, None]:
        return step(h, *xs), None

    if remat is not None:
        body = jax.checkpoint(body, policy=_policy(remat), prevent_cse=bool(unroll) and unroll != 1)
    return jax.lax.scan(body, h0, (plan.sizes, plan.conditions), unroll=unroll)[0]


def integrate(
    field: Field,
    h0: State,
    grid: Grid,
    *,
    solver: Solver = "euler",
    unroll: int | bool = 1,
    remat: str | None = None,
) -> State:
    """Integrates `dh/dt = field(t, h)` over a fixed grid of times, and returns `h` at the last.

    Args:
        field: any callable `field(t, h)`; `t` is a float32 scalar, `h` any pytree of arrays.
        h0: the state at `grid[0]`.
        grid: increasing times, (N + 1,), InputError for others; made float32, because bfloat16 times lose steps.
        solver: a name in `odelm.ode.SOLVERS`, or any explicit Runge-Kutta instance of Diffrax.
        unroll: steps unrolled in the scan; True unrolls all.
        remat: the name of one of `jax.checkpoint_policies`; None saves every intermediate for the gradient.
    """
    return follow(field, h0, plan(field, grid, solver=solver), unroll=unroll, remat=remat)


def integrate_diffrax(field: Field, h0: State, grid: Grid, *, solver: Solver = "euler") -> State:
    """The same as `integrate`, through `diffrax.diffeqsolve`: slower to compile, for any Diffrax solver.

    A state below float32 is rounded where the field sees it and at the end, not once a step.
    """
    solver = _bound(get_solver(solver), field)
    grid = _times(grid)
    controller = diffrax.StepTo(ts=grid)
    solution = diffrax.diffeqsolve(
        _term(field, h0),
        solver,
        t0=grid[0],
        t1=grid[-1],
        dt0=None,
        y0=h0,
        stepsize_controller=controller,
        max_steps=len(grid) - 1,
    )
    return _rounded(jax.tree.map(lambda y: y[-1], solution.ys), h0)


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
        max_steps: of attempts, rejected ones included.

    Returns the state and the number of evaluations of the field, an int32 scalar that counts those of rejected
    steps too. Raises InputError for a solver without an error estimate, and a RuntimeError (under `jax.jit` its
    subclass `jax.errors.JaxRuntimeError`) when `max_steps` do not reach `t1`.
    """
    solver = get_solver(solver)
    if not has_error_estimate(solver):
        raise InputError(
            f"{type(solver).__name__} has no error estimate, so it cannot choose its own steps; "
            "try heun, bosh3, tsit5 or dopri5"
        )
    if not tolerance > 0:
        raise InputError(f"the tolerance is {tolerance}, expected a positive number such as 1e-2")
    solution = diffrax.diffeqsolve(
        _term(field, h0),
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
    state = eqx.error_if(
        _rounded(jax.tree.map(lambda y: y[-1], solution.ys), h0),
        solution.result != diffrax.RESULTS.successful,
        f"{max_steps} steps did not reach t1 at tolerance {tolerance:g}: raise max_steps or the tolerance",
    )
    steps, tableau = solution.stats["num_steps"], full_tableau(solver)
    if not tableau.fsal:
        return state, steps * tableau.num_stages
    _, first_attempts, _ = cast(tuple, solution.controller_state)
    return state, steps * (tableau.num_stages - 1) + first_attempts


class _CountingController(diffrax.PIDController):
    """A PID controller that counts the attempts at the first step.

    "First same as last" methods take a step's first stage from the step before it. Where none was accepted
    yet there is nothing to take, so each attempt at the first step costs one evaluation more than later ones.
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
        return keep, *times_and_jump, (state, attempts + ~accepted, accepted | keep), result


def _step_function(field: Any, solver: diffrax.AbstractSolver) -> Callable[[Any, jax.Array, Condition], Any]:
    """Returns `step(h, dt, conditions) -> h'`, conditions with a leading axis of stages (R)."""
    if isinstance(solver, ProjectedEuler):
        _bound(solver, field)
        return lambda h, dt, conditions: _rounded(field.project(_stage(conditions, 0), h, dt), h)
    increment = field.increment if isinstance(field, ConditionedField) else field
    tableau = get_tableau(solver)

    def step(h: Any, dt: jax.Array, conditions: Condition) -> Any:
        ks = []
        for r, row in enumerate(tableau.a):
            # Without the barrier XLA inlines each stage's arithmetic into all later ones, and the compile
            # time of a many-stage method grows exponentially where no matrix product separates them.
            inner = jax.lax.optimization_barrier(_advanced(h, dt, row, ks)) if r else h
            ks.append(increment(_stage(conditions, r), inner))
        return _advanced(h, dt, tableau.b, ks)

    return step


def _advanced(h: State, dt: jax.Array, weights: tuple[float, ...], ks: list[State]) -> State:
    """Returns `h + dt * sum_r weights_r k_r`, summed in float32 and rounded to the dtypes of `h`."""
    used = [(weight, k) for weight, k in zip(weights, ks, strict=True) if weight]
    if not used:
        return h

    def advance(y: jax.Array, *slopes: jax.Array) -> jax.Array:
        wide = jnp.promote_types(y.dtype, jnp.float32)
        slope = sum(weight * k.astype(wide) for (weight, _), k in zip(used, slopes, strict=True))
        return (y + dt * slope).astype(y.dtype)

    return jax.tree.map(advance, h, *(k for _, k in used))


def _times(grid: Grid) -> jax.Array:
    """Returns the grid in float32 or wider: bfloat16 arithmetic on times loses or moves steps.

    Raises InputError for times that do not increase, unless they are traced: then their values are not known yet.
    """
    if any(isinstance(time, Tracer) for time in jax.tree.leaves(grid)):
        grid = jnp.asarray(grid)
        return grid.astype(jnp.promote_types(grid.dtype, jnp.float32))
    dtype = jnp.promote_types(getattr(grid, "dtype", np.float64), jnp.float32)
    return jnp.asarray(increasing(cast(Times, grid), jax.dtypes.canonicalize_dtype(dtype)))


def _stage(conditions: Condition, r: int) -> Condition:
    return jax.tree.map(lambda leaf: leaf[r], conditions)


def _term(field: Field, h0: Any) -> diffrax.ODETerm:
    """Returns the field for Diffrax, which keeps a 16-bit state in float32; the field sees it in its own dtype."""
    return diffrax.ODETerm(lambda t, h, _: _rounded(field(t, _rounded(h, h0)), h))


def _rounded(value: State, like: State) -> State:
    return jax.tree.map(lambda v, y: v.astype(y.dtype), value, like)


def _bound(solver: diffrax.AbstractSolver, field: Field) -> diffrax.AbstractSolver:
    if not isinstance(solver, ProjectedEuler):
        return solver
    if not isinstance(field, ProjectedField):
        raise InputError(
            f"projected_euler needs a field with condition(t) and project(condition, h, dt); {field!r} has not: "
            "try euler"
        )
    return dataclasses.replace(solver, field=field if _is_hashable(field) else _ByIdentity(field))


class _ByIdentity:
    """A field that cannot be hashed, such as a dataclass of arrays, for Diffrax, which hashes its solver."""

    def __init__(self, field: ProjectedField):
        self.condition, self.project = field.condition, field.project


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _policy(name: str) -> Callable[..., bool]:
    policies = [name for name in dir(jax.checkpoint_policies) if not name.startswith("_")]
    if name not in policies:
        raise InputError(f"remat is {name!r}; {nearest(name, policies)}")
    return getattr(jax.checkpoint_policies, name)

"""Names to Diffrax solvers, and the Butcher tableaux that the fixed-grid integration evaluates.

An explicit Runge-Kutta step from `h` at `t` with size `dt` is

    k_r = f(t + c_r dt, h + dt * sum_{q < r} a_rq k_q),      h' = h + dt * sum_r b_r k_r.

Diffrax carries the tableau (a, b, c) of its own solvers; it lacks one for Euler, and the classical fourth-order method,
so both are given here. `OwnStep` is Euler's method by a field's own rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import lineax as lx
import numpy as np
import optimistix as optx

from odelm.errors import InputError, nearest


class RK4(diffrax.AbstractERK):
    """The classical fourth-order Runge-Kutta method (Kutta 1901); four evaluations, no error estimate."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(  # pyright: ignore
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.zeros(4),
        c=np.array([0.5, 0.5, 1.0]),
    )
    interpolation_cls: ClassVar[Callable[..., diffrax.AbstractLocalInterpolation]] = (
        diffrax.ThirdOrderHermitePolynomialInterpolation.from_k
    )

    def order(self, terms: diffrax.AbstractTerm) -> int:
        return 4


class OwnStep(diffrax.AbstractSolver):
    """Euler's method by the field's own rule, `h' = step(condition(t), h, dt)`; by the ordinary rule if the field has
    none.

    A post-norm model keeps its state normalised. Its residual `Block(h) - h` contains `-h`, which explicit
    Euler amplifies for steps above 2; scaling the branches inside the norms, `N(h + dt * branch(h))`,
    is the same network at `dt = 1` and stable beyond it, the norm being the retraction (Hairer, Lubich and
    Wanner, Geometric Numerical Integration, section IV.4). `take(t, h, dt)` is supplied by the integration; see
    `odelm.ode.SteppingField`. The plain method, for any field, is `diffrax.Euler()`.
    """

    take: Callable[[Any, Any, Any], Any] | None = eqx.field(default=None, static=True)
    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = diffrax.LocalLinearInterpolation

    def order(self, terms: diffrax.AbstractTerm) -> int:
        return 1

    def init(self, terms, t0, t1, y0, args) -> None:
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        assert self.take is not None, "the integration supplies it"
        y1 = self.take(t0, y0, t1 - t0)
        return y1, None, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


SOLVERS: dict[str, Callable[[], diffrax.AbstractSolver]] = {
    "euler": OwnStep,
    "midpoint": diffrax.Midpoint,
    "heun": diffrax.Heun,
    "ralston": diffrax.Ralston,
    "bosh3": diffrax.Bosh3,
    "rk4": RK4,
    "tsit5": diffrax.Tsit5,
    "dopri5": diffrax.Dopri5,
    "dopri8": diffrax.Dopri8,
}


def _root_finder() -> optx.Newton:
    """Returns a root finder for states of any size: its linear equations are solved without forming a matrix."""
    return optx.Newton(rtol=1e-3, atol=1e-3, linear_solver=lx.GMRES(rtol=1e-3, atol=1e-3))


IMPLICIT_SOLVERS: dict[str, Callable[[], diffrax.AbstractSolver]] = {
    "implicit_euler": lambda: diffrax.ImplicitEuler(root_finder=_root_finder()),
    "kvaerno3": lambda: diffrax.Kvaerno3(root_finder=_root_finder()),
    "kvaerno5": lambda: diffrax.Kvaerno5(root_finder=_root_finder()),
}
"""Solvers that only `diffeqsolve` can follow (`odelm.ode.make_diffrax_plan`)."""

Solver = str | diffrax.AbstractSolver


def get_solver(solver: Solver) -> diffrax.AbstractSolver:
    """Returns the Diffrax solver of that name, or the instance itself; raises InputError on any other."""
    if isinstance(solver, diffrax.AbstractSolver):
        return solver
    known = SOLVERS | IMPLICIT_SOLVERS
    if solver not in known:
        raise InputError(f"solver is {solver!r}; {nearest(str(solver), known)}")
    return known[solver]()


@dataclass(frozen=True)
class Tableau:
    """An explicit method as nested tuples of floats, hashable, without the stages that the result ignores."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    @property
    def stages(self) -> int:
        """Evaluations of the field in one step."""
        return len(self.b)


EULER = Tableau(a=((),), b=(1.0,), c=(0.0,))


def is_own_step(solver: diffrax.AbstractSolver) -> bool:
    """True for Euler's method by the field's own rule."""
    return isinstance(solver, OwnStep)


def get_tableau(solver: diffrax.AbstractSolver) -> Tableau:
    """Returns the explicit tableau; InputError if the solver is not an explicit Runge-Kutta method.

    A trailing stage of weight zero ("first same as last" methods evaluate one for their error estimate) is
    left out: a fixed grid has no use for it.
    """
    if isinstance(solver, diffrax.Euler | OwnStep):
        return EULER
    tableau = getattr(solver, "tableau", None)
    if not isinstance(solver, diffrax.AbstractERK) or not isinstance(tableau, diffrax.ButcherTableau):
        raise InputError(
            f"{type(solver).__name__} is not an explicit Runge-Kutta method; a fixed grid takes one of "
            f"{', '.join(SOLVERS)}, or a diffrax.AbstractERK instance; diffeqsolve takes any (integrator='diffrax')"
        )
    a = ((), *(tuple(map(float, row)) for row in tableau.a_lower))
    b = tuple(map(float, tableau.b_sol))
    used = 1 + max(r for r, weight in enumerate(b) if weight)
    return Tableau(a[:used], b[:used], (0.0, *map(float, tableau.c))[:used])


def evaluations(solver: Solver, steps: int) -> int:
    """Returns how often a fixed grid of `steps` steps evaluates the field."""
    return steps * get_tableau(get_solver(solver)).stages


def stages_of(solver: diffrax.AbstractSolver) -> int:
    """Returns the evaluations of one step; 1 for a method without an explicit tableau."""
    explicit = isinstance(solver, diffrax.Euler | OwnStep | diffrax.AbstractERK)
    return get_tableau(solver).stages if explicit else 1


def full_tableau(solver: diffrax.AbstractSolver) -> diffrax.ButcherTableau:
    """Returns Diffrax's own tableau of a solver that has one."""
    return getattr(solver, "tableau")  # noqa: B009


def has_error_estimate(solver: diffrax.AbstractSolver) -> bool:
    """True for solvers that can choose their own steps."""
    tableau = getattr(solver, "tableau", None)
    return tableau is not None and bool(np.any(jax.tree.leaves(tableau.b_error)))

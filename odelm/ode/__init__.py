"""Integration over depth time. Nothing here knows of language; any callable field and pytree state will do."""

from odelm.ode import grid
from odelm.ode.integrate import (
    ConditionedField,
    Plan,
    ProjectedField,
    follow,
    integrate,
    integrate_adaptive,
    integrate_diffrax,
    plan,
)
from odelm.ode.solver import (
    RK4,
    SOLVERS,
    ProjectedEuler,
    Solver,
    evaluations,
    get_solver,
    get_tableau,
    has_error_estimate,
)

__all__ = [
    "RK4",
    "SOLVERS",
    "ConditionedField",
    "Plan",
    "ProjectedEuler",
    "ProjectedField",
    "Solver",
    "evaluations",
    "follow",
    "get_solver",
    "get_tableau",
    "grid",
    "has_error_estimate",
    "integrate",
    "integrate_adaptive",
    "integrate_diffrax",
    "plan",
]

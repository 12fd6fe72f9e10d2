"""Integration over depth time. Nothing here knows of language; any callable field and pytree state will do."""

from odelm.ode import grid
from odelm.ode.adaptive import integrate_adaptive
from odelm.ode.diffrax_path import follow_diffrax, integrate_diffrax, make_diffrax_plan
from odelm.ode.plan import (
    ConditionedField,
    Field,
    Grid,
    Plan,
    RememberingField,
    SteppingField,
    follow,
    integrate,
    make_plan,
    padded,
)
from odelm.ode.solver import (
    IMPLICIT_SOLVERS,
    RK4,
    SOLVERS,
    OwnStep,
    Solver,
    Tableau,
    evaluations,
    get_solver,
    get_tableau,
    has_error_estimate,
)

__all__ = [
    "IMPLICIT_SOLVERS",
    "RK4",
    "SOLVERS",
    "ConditionedField",
    "Field",
    "Grid",
    "OwnStep",
    "Plan",
    "RememberingField",
    "Solver",
    "SteppingField",
    "Tableau",
    "evaluations",
    "follow",
    "follow_diffrax",
    "get_solver",
    "get_tableau",
    "grid",
    "has_error_estimate",
    "integrate",
    "integrate_adaptive",
    "integrate_diffrax",
    "make_diffrax_plan",
    "make_plan",
    "padded",
]

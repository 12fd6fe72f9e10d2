"""Names, tableaux and numbers of evaluations of the solvers."""

import diffrax
import numpy as np
import pytest

from odelm import ode
from odelm.errors import InputError
from odelm.ode.solver import has_error_estimate

STAGES = {
    "euler": 1,
    "midpoint": 2,
    "heun": 2,
    "ralston": 2,
    "bosh3": 3,
    "rk4": 4,
    "tsit5": 6,
    "dopri5": 6,
    "dopri8": 13,
}


@pytest.mark.parametrize("name", ode.SOLVERS)
def test_evaluations(name):
    assert ode.evaluations(name, 5) == 5 * STAGES[name]
    assert ode.evaluations(ode.get_solver(name), 1) == STAGES[name]


@pytest.mark.parametrize("name", ode.SOLVERS)
def test_tableaux_are_consistent(name):
    tableau = ode.get_tableau(ode.get_solver(name))
    assert len(tableau.a) == len(tableau.b) == len(tableau.c) == tableau.stages == STAGES[name]
    # Sums of at most 13 published coefficients below 100 in size, each rounded to float64.
    np.testing.assert_allclose(sum(tableau.b), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose([sum(row) for row in tableau.a], tableau.c, rtol=0, atol=1e-12)
    assert [len(row) for row in tableau.a] == list(range(tableau.stages)), "a stage may use earlier ones only"
    assert tableau.b[-1] != 0


def test_an_instance_is_taken_as_it_is():
    solver = diffrax.Heun()
    assert ode.get_solver(solver) is solver


@pytest.mark.parametrize("name, near", [("hune", "heun"), ("Euler", "euler"), ("rk5", "rk4"), ("tsit", "tsit5")])
def test_an_unknown_name_gets_the_nearest(name, near):
    with pytest.raises(InputError, match=f"solver is '{name}'; did you mean '{near}'\\? choices: bosh3, dopri5"):
        ode.get_solver(name)


@pytest.mark.parametrize("solver", [diffrax.Kvaerno3(), diffrax.SemiImplicitEuler(), diffrax.ImplicitEuler()])
def test_an_implicit_method_has_no_tableau(solver):
    with pytest.raises(InputError, match=f"{type(solver).__name__} is not an explicit Runge-Kutta method"):
        ode.get_tableau(solver)


def test_which_solvers_choose_their_steps():
    able = {name for name in ode.SOLVERS if has_error_estimate(ode.get_solver(name))}
    assert able == set(ode.SOLVERS) - {"euler", "rk4"}

"""Fixed grids: what is computed when, in which dtype, and what is refused."""

import dataclasses

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odelm import ode
from odelm.errors import InputError


def test_euler_by_hand():
    """Two steps of 1 and 0.5 on h' = t + h from 1: 1 + (0 + 1), then 2 + (1 + 2) / 2; all exact in float32."""
    assert float(ode.integrate(lambda t, h: t + h, jnp.float32(1), [0, 1, 1.5])) == 3.5


def test_a_padded_plan_takes_its_own_steps_only():
    """The two steps by hand, in a plan with room for five."""

    def field(t, h):
        return t + h

    plan = ode.padded(ode.make_plan(field, [0, 1, 1.5]), 5)
    assert plan.sizes.shape == (5,) and int(plan.count) == 2
    assert float(ode.follow(field, jnp.float32(1), plan)[0]) == 3.5


def test_heun_by_hand():
    """One step of 1 on h' = t + h from 1: slopes 1 and 1 + 2, their mean 2."""
    assert float(ode.integrate(lambda t, h: t + h, jnp.float32(1), [0, 1], solver="heun")) == 3.0


@pytest.mark.parametrize("integrate", [ode.integrate, ode.integrate_diffrax])
def test_a_bfloat16_state_keeps_its_dtype_and_its_times(integrate):
    """bfloat16 has no odd numbers above 256, so times in it would never be odd; the field counts those that are."""

    def field(t, h):
        assert t.dtype == jnp.float32
        return {"odd": t % 2, "half": jnp.ones_like(h["half"])}

    start = {"odd": jnp.bfloat16(0), "half": jnp.float16(0)}
    end = jax.jit(lambda h: integrate(field, h, np.arange(256, 263)))(start)
    assert (end["odd"].dtype, end["half"].dtype) == (jnp.bfloat16, jnp.float16)
    assert (float(end["odd"]), float(end["half"])) == (3.0, 6.0)


class Counted:
    """h' = c(t) h, counting how often `condition` and `increment` are traced."""

    def __init__(self):
        self.conditions = self.increments = 0

    def condition(self, t):
        self.conditions += 1
        return jnp.cos(t)

    def increment(self, condition, h):
        self.increments += 1
        return condition * h

    def __call__(self, t, h):
        return self.increment(self.condition(t), h)


def test_conditions_are_planned_once_and_steps_traced_once():
    field = Counted()
    plan = ode.make_plan(field, np.linspace(0, 1, 9), solver="heun")
    assert (field.conditions, field.increments) == (1, 0)
    end, _ = ode.follow(field, jnp.float32(1), plan)
    assert (field.conditions, field.increments) == (1, 2)
    again = ode.integrate(Counted(), jnp.float32(1), np.linspace(0, 1, 9), solver="heun")
    assert float(end) == float(again)


def test_plan_holds_the_times_of_every_stage():
    plan = ode.make_plan(lambda t, h: h, [0, 1, 3], solver="rk4")
    np.testing.assert_array_equal(plan.sizes, [1, 2])
    np.testing.assert_array_equal(plan.conditions, [[0, 0.5, 0.5, 1], [1, 2, 2, 3]])


def test_a_plan_is_a_pytree():
    plan = ode.make_plan(lambda t, h: h, [0, 1, 3])
    end = jax.jit(lambda plan, h: ode.follow(lambda t, h: h, h, plan)[0])(plan, jnp.float32(1))
    assert float(end) == 6.0


@pytest.mark.parametrize("integrate", [ode.integrate, ode.integrate_diffrax])
def test_euler_is_the_fields_own_step_and_the_instance_is_the_plain_method(integrate):
    field = OnTheCircle(jnp.float32(0.3))
    own, plain = (integrate(field, jnp.array([1.0, 0.0]), [0, 1, 2], solver=s) for s in ("euler", diffrax.Euler()))
    assert np.linalg.norm(own) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(plain) == pytest.approx(1 + 0.3**2, abs=1e-6)


def test_a_memory_needs_a_field_that_uses_one():
    with pytest.raises(InputError, match="a memory was given, but function has no evaluation"):
        field = lambda t, h: h  # noqa: E731
        ode.follow(field, jnp.ones(2), ode.make_plan(field, [0, 1]), jnp.zeros((1, 1)))


class Adding:
    """h' = the memory's sum so far plus h, which every evaluation adds to its own memory."""

    def condition(self, t):
        return t

    def increment(self, condition, h):
        return h

    def step(self, condition, h, dt):
        return h + dt * h

    def increment_remembering(self, condition, h, memory, place):
        return memory[place] + h, memory.at[place].add(h)

    def step_remembering(self, condition, h, dt, memory, place):
        return h + dt * (memory[place] + h), memory.at[place].add(h)

    def __call__(self, t, h):
        return h


@pytest.mark.parametrize("solver, stages", [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_every_step_and_stage_has_a_memory_of_its_own(solver, stages):
    plan = ode.make_plan(Adding(), [0, 1, 3], solver=solver)
    memory = jnp.arange(2.0 * stages).reshape(2, stages)
    end, after = ode.follow(Adding(), jnp.float32(1), plan, memory)
    assert after.shape == memory.shape
    # The first step's first stage sees h = 1 and its own 0; in Euler's second step h = 2 meets 1.
    assert float(after[0, 0]) == 1
    if solver == "euler":
        np.testing.assert_array_equal(after, [[1], [3]])
        assert float(end) == 2 + 2 * 3


@pytest.mark.parametrize("integrate", [ode.integrate, ode.integrate_diffrax])
def test_an_unknown_solver_is_named(integrate):
    with pytest.raises(InputError, match="did you mean 'midpoint'"):
        integrate(lambda t, h: h, jnp.ones(2), [0, 1], solver="midpiont")


@pytest.mark.parametrize("integrate", [ode.integrate, ode.integrate_diffrax])
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0, 2, 1], r"grid\[2\] is 1, not above grid\[1\] = 2"),
        ([1, 0], r"grid\[1\] is 0, not above"),
        ([0, 0], r"grid\[1\] is 0, not above"),
        ([0, np.nan, 2], r"grid\[1\] is nan, expected finite"),
        ([0, np.inf], r"grid\[1\] is inf"),
        ([], r"shape \(0,\)"),
        ([0], r"shape \(1,\)"),
        (["a", 1], "expected numbers"),
        # Two times of float64 that are one in float32, in which the steps are taken.
        (np.array([0, 1e8, 1e8 + 1]), r"grid\[2\]"),
    ],
)
def test_a_grid_that_does_not_increase_is_named(integrate, times, message):
    with pytest.raises(InputError, match=message):
        integrate(lambda t, h: h, jnp.ones(2), times)
    with pytest.raises(InputError, match=message):
        jax.jit(lambda h: integrate(lambda t, h: h, h, times))(jnp.ones(2))


def test_a_grid_may_be_traced():
    end = jax.jit(lambda t: ode.integrate(lambda t, h: t + h, jnp.float32(1), [0, t, 1.5]))(1.0)
    assert float(end) == 3.5


def test_an_unknown_remat_policy_gets_the_nearest():
    with pytest.raises(InputError, match="remat is 'nothing_savable'; did you mean 'nothing_saveable'"):
        ode.integrate(lambda t, h: h, jnp.ones(2), [0, 1], remat="nothing_savable")


def test_remat_recomputes():
    """With nothing saved the backward pass calls sin again; with everything saved it does not."""

    def gradient(remat):
        step = jax.grad(lambda h: ode.integrate(lambda t, h: jnp.tanh(jnp.exp(h)), h, [0, 1, 2], remat=remat))
        return str(jax.make_jaxpr(step)(jnp.float32(1))).count("= tanh")

    assert gradient("nothing_saveable") > gradient(None)


@pytest.mark.parametrize(("unroll", "barriers"), [(True, True), (2, True), (1, False), (False, False)])
def test_what_an_unrolled_loop_computes_again_is_not_merged_with_the_first_time(unroll, barriers):
    """XLA would keep it in place of computing it again; a loop keeps the two apart by itself."""

    def last(h):
        return ode.integrate(lambda t, h: jnp.tanh(h), h, [0, 1, 2, 3], unroll=unroll, remat="nothing_saveable")

    assert ("optimization_barrier" in jax.jit(jax.grad(last)).lower(jnp.float32(1)).as_text()) == barriers


@dataclasses.dataclass(frozen=True)
class OnTheCircle:
    """A plain dataclass of an array, which cannot be hashed, as a user may write it."""

    rate: jax.Array

    def condition(self, t):
        return self.rate

    def increment(self, condition, h):
        return condition * jnp.stack([-h[1], h[0]])

    def step(self, condition, h, dt):
        moved = h + dt * self.increment(condition, h)
        return moved / jnp.linalg.norm(moved)

    def __call__(self, t, h):
        return self.increment(self.condition(t), h)


def test_a_field_with_a_step_need_not_be_hashable():
    field, h0, times = OnTheCircle(jnp.float32(0.3)), jnp.array([1.0, 0.0]), jnp.arange(5.0)
    scanned = ode.integrate(field, h0, times)
    walked = ode.integrate_diffrax(field, h0, times)
    np.testing.assert_allclose(scanned, walked, atol=1e-6)
    assert np.linalg.norm(scanned) == pytest.approx(1, abs=1e-6)

"""The idea of the project: a stack of layers is the integration of `dh/dt = f(t, h)` over depth time.

`integrate` crosses a fixed grid in one `lax.scan`. With Euler's method and unit steps that is the ordinary
residual network `h <- h + f(t, h)`, bit for bit if compiled alike (a rolled scan against an unrolled loop may
differ by rounding); with fewer, larger steps it is the same model, cheaper.

A field is any callable `field(t, h)` that returns the derivative of `h`, a pytree of the same structure. It may offer
more, which is then used:

- a `ConditionedField` separates what depends on `t` only, which is computed for the whole grid ahead of the scan
  (`make_plan`) and can be kept from one call to the next;
- a `SteppingField` takes Euler steps by a rule of its own, such as the projected step of a post-norm block;
- a `RememberingField` reads and writes a memory at each evaluation, such as the keys and values of attention.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from odelm.errors import InputError, nearest
from odelm.ode.dtypes import at_least_float32
from odelm.ode.grid import Times, increasing
from odelm.ode.solver import EULER, Solver, Tableau, get_solver, get_tableau, is_own_step

State = TypeVar("State")
Condition = Any
Memory = Any
Place = tuple[jax.Array, int] | None
"""A step, int32 (), and a stage of it; None without a memory."""
Grid = Sequence[float] | np.ndarray | jax.Array
Field = Callable[[Any, Any], Any]


@runtime_checkable
class ConditionedField(Protocol):
    """A field whose dependence on time goes through a condition: `field(t, h) = increment(condition(t), h)`."""

    def condition(self, t: jax.Array) -> Condition: ...

    def increment(self, condition: Condition, h: Any) -> Any: ...

    def __call__(self, t: jax.Array, h: Any) -> Any: ...


@runtime_checkable
class SteppingField(ConditionedField, Protocol):
    """A field that takes Euler steps of size `dt` by its own rule; for most fields that is `h + dt * increment`."""

    def step(self, condition: Condition, h: Any, dt: jax.Array) -> Any: ...


@runtime_checkable
class RememberingField(SteppingField, Protocol):
    """A field whose evaluations read a memory and return it updated; every (step, stage) has a part of its own.

    An evaluation is given the whole memory and the place of its part, and changes that part only: so the compiler
    updates the memory in place, and copies no other part.
    """

    def increment_remembering(
        self, condition: Condition, h: Any, memory: Memory, place: Place
    ) -> tuple[Any, Memory]: ...

    def step_remembering(
        self, condition: Condition, h: Any, dt: jax.Array, memory: Memory, place: Place
    ) -> tuple[Any, Memory]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """One run along a stretch of depth time, with everything that depends on time computed: a pytree, made once and
    used often.

    N steps of R stages. The plan says where the field is evaluated, so a memory of those evaluations belongs to one
    plan.
    """

    sizes: jax.Array
    """Step sizes, float32 (N,)."""
    times: jax.Array
    """The time of each stage, float32 (N, R)."""
    conditions: Condition
    """The field's condition at those times; each leaf has leading axes (N, R)."""
    solver: Any = None
    """The Diffrax solver that follows the plan, as a pytree (`diffrax_path.PortableSolver`); None is the scan here."""
    count: jax.Array | None = dataclasses.field(default=None, kw_only=True)
    """How many of the N steps are taken, int32 (), in a plan made by `padded`; None is all of them."""
    tableau: Tableau = dataclasses.field(default=EULER, metadata=dict(static=True))
    own_step: bool = dataclasses.field(default=False, metadata=dict(static=True))
    """Whether a step is the field's own Euler step, in place of the tableau's."""
    unroll: int | bool = dataclasses.field(default=1, metadata=dict(static=True))
    remat: str | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def evaluations(self) -> int:
        """How often following the plan evaluates the field; for an implicit solver, the number of steps."""
        return self.times.shape[-2] * self.times.shape[-1]


def make_plan(
    field: Field, grid: Grid, *, solver: Solver = "euler", unroll: int | bool = 1, remat: str | None = None
) -> Plan:
    """Computes everything that does not depend on the state, for `follow`.

    Args:
        grid: increasing times, float (N + 1,); InputError for any other grid, as far as its values are known.
        solver: "euler" is the field's own step where it has one; InputError for one that is not an explicit
            Runge-Kutta method.
        unroll: that of `lax.scan`; True unrolls all steps.
        remat: the name of one of `jax.checkpoint_policies`; None saves every intermediate for the gradient.
    """
    check_field(field)
    solver = get_solver(solver)
    tableau, own_step = get_tableau(solver), is_own_step(solver) and isinstance(field, SteppingField)
    if remat is not None:
        _policy(remat)
    grid = as_times(grid)
    sizes = jnp.diff(grid)
    times = grid[:-1, None] + sizes[:, None] * jnp.asarray(tableau.c, grid.dtype)[None]
    condition = field.condition if isinstance(field, ConditionedField) else lambda t: t
    conditions = jax.vmap(jax.vmap(condition))(times)
    return Plan(sizes, times, conditions, None, tableau, own_step, unroll, remat)


def padded(plan: Plan, steps: int) -> Plan:
    """Returns a plan with room for `steps` steps that takes only its own, so that plans of different numbers of steps
    share one compiled program.

    It is followed by a loop whose length is known only when it runs, and which has no gradient. Its `evaluations` are
    those that there is room for.
    """

    def pad(leaf: jax.Array) -> jax.Array:
        # In NumPy, because JAX would compile a program for each shape.
        return jax.device_put(np.pad(np.asarray(leaf), [(0, steps - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)]))

    sizes, times, conditions = jax.tree.map(pad, (plan.sizes, plan.times, plan.conditions))
    count = jax.device_put(np.int32(len(plan.sizes)))
    return dataclasses.replace(plan, sizes=sizes, times=times, conditions=conditions, count=count)


def follow(field: Field, h0: State, plan: Plan, memory: Memory = None) -> tuple[State, Memory]:
    """Integrates `h0` along a plan in one loop; returns the state at its end, and the memory updated.

    `memory` is that of a `RememberingField`, each leaf with leading axes (N, R); None is no memory, and is returned.
    Arithmetic is float32 inside a step; the state keeps the dtype it came in, rounded once a step.
    """
    h0 = as_state(h0)
    step = _step_function(field, plan, remembering=memory is not None)

    def body(carry: tuple[State, Memory], xs: tuple[jax.Array, Condition, Any]) -> tuple[tuple[State, Memory], None]:
        return step(*carry, *xs), None

    if plan.remat is not None:
        rolled = int(plan.unroll) <= 1 and plan.unroll is not True
        body = jax.checkpoint(body, policy=_policy(plan.remat), prevent_cse=not rolled)
    number = None if memory is None else jnp.arange(len(plan.sizes), dtype=jnp.int32)
    xs = (plan.sizes, plan.conditions, number)
    if plan.count is not None:
        return jax.lax.fori_loop(0, plan.count, lambda i, carry: body(carry, _stage(xs, i))[0], (h0, memory))
    return jax.lax.scan(body, (h0, memory), xs, unroll=plan.unroll)[0]


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
        field: any callable `field(t, h)`; `t` is a float32 scalar, `h` any pytree of arrays. A block of a model becomes
            a field together with what it sees beside the state: `odelm.models.BlockField(block)`.
        h0: the state at `grid[0]`; numbers in it become arrays, and whole numbers floats.
        grid: increasing times, (N + 1,), InputError for others; made float32, because bfloat16 times lose steps.
        solver: a name in `odelm.ode.SOLVERS`, or any explicit Runge-Kutta instance of Diffrax.
        unroll: steps unrolled in the scan; True unrolls all.
        remat: the name of one of `jax.checkpoint_policies`; None saves every intermediate for the gradient.
    """
    return follow(field, h0, make_plan(field, grid, solver=solver, unroll=unroll, remat=remat))[0]


def as_times(grid: Grid) -> jax.Array:
    """Returns the grid in float32 or wider: bfloat16 arithmetic on times loses or moves steps.

    Raises InputError for times that do not increase, unless they are traced: then their values are not known yet.
    """
    if any(isinstance(time, Tracer) for time in jax.tree.leaves(grid)):
        grid = jnp.asarray(grid)
        return grid.astype(at_least_float32(grid.dtype))
    dtype = at_least_float32(jax.dtypes.canonicalize_dtype(getattr(grid, "dtype", np.float64)))
    return jnp.asarray(increasing(cast(Times, grid), dtype))


def as_state(h0: Any) -> Any:
    """Returns a state whose leaves are arrays of floats, as the integration needs them."""

    def as_floats(leaf: Any) -> jax.Array:
        array = jnp.asarray(leaf)
        return array if jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(float)

    return jax.tree.map(as_floats, h0)


def check_field(field: Any) -> None:
    """Raises InputError for an object that is not a field but names the field to use instead (`field_class`)."""
    made = getattr(field, "field_class", None)
    if made is not None:
        raise InputError(
            f"a {type(field).__name__} is no field of (t, h): its calls take more than a time and a state; integrate "
            f"{made}"
        )


def rounded_like(value: State, like: State) -> State:
    """Returns a state with each array in the dtype of its counterpart."""
    return jax.tree.map(lambda v, y: v.astype(y.dtype), value, like)


def _step_function(field: Any, plan: Plan, *, remembering: bool) -> Callable[..., tuple[Any, Memory]]:
    """Returns `step(h, memory, dt, conditions, number) -> (h', memory)`, conditions with a leading axis of stages (R);
    `number` is None without a memory."""
    if remembering and not isinstance(field, RememberingField):
        raise InputError(
            f"a memory was given, but {type(field).__name__} has no evaluation that uses one: leave it out"
        )
    if plan.own_step:
        return lambda h, memory, dt, conditions, number: _own_step(field, h, memory, dt, conditions, number)
    if remembering:
        increment = field.increment_remembering
    else:
        plain = field.increment if isinstance(field, ConditionedField) else field

        def increment(condition: Condition, h: Any, memory: Memory, place: Place) -> tuple[Any, Memory]:
            return plain(condition, h), None

    def step(
        h: Any, memory: Memory, dt: jax.Array, conditions: Condition, number: jax.Array | None
    ) -> tuple[Any, Memory]:
        ks = []
        for r, row in enumerate(plan.tableau.a):
            # Without the barrier XLA inlines each stage's arithmetic into all later ones, and the compile
            # time of a many-stage method grows exponentially where no matrix product separates them.
            inner = jax.lax.optimization_barrier(_advanced(h, dt, row, ks)) if r else h
            k, memory = increment(_stage(conditions, r), inner, memory, None if number is None else (number, r))
            ks.append(k)
        return _advanced(h, dt, plan.tableau.b, ks), memory

    return step


def _own_step(
    field: Any, h: Any, memory: Memory, dt: jax.Array, conditions: Condition, number: jax.Array | None
) -> tuple[Any, Memory]:
    condition = _stage(conditions, 0)
    if number is None:
        return rounded_like(field.step(condition, h, dt), h), None
    after, memory = field.step_remembering(condition, h, dt, memory, (number, 0))
    return rounded_like(after, h), memory


def _advanced(h: State, dt: jax.Array, weights: tuple[float, ...], ks: list[State]) -> State:
    """Returns `h + dt * sum_r weights_r k_r`, summed in float32 and rounded to the dtypes of `h`."""
    used = [(weight, k) for weight, k in zip(weights, ks, strict=True) if weight]
    if not used:
        return h

    def advance(y: jax.Array, *slopes: jax.Array) -> jax.Array:
        wide = at_least_float32(y.dtype)
        slope = sum(weight * k.astype(wide) for (weight, _), k in zip(used, slopes, strict=True))
        return (y.astype(wide) + dt.astype(wide) * slope).astype(y.dtype)

    return jax.tree.map(advance, h, *(k for _, k in used))


def _stage(tree: Any, r: int | jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[r], tree)


def _policy(name: str) -> Callable[..., bool]:
    policies = [name for name in dir(jax.checkpoint_policies) if not name.startswith("_")]
    if name not in policies:
        raise InputError(f"remat is {name!r}; {nearest(name, policies)}")
    return getattr(jax.checkpoint_policies, name)

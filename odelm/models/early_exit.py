"""Early exits: a row, or a token, whose state has settled crosses the rest of the depth in one step.

After a step, at time `t`, one Euler step may cross the rest of the depth to its end `T`. That step adds an error of
about `(T - t)² / 2 |d²h/dt²|`, the estimate for Euler's method, in which the second derivative is taken from the
difference between the last two slopes. Where that error is small beside the state, or where the prediction that would
be read now has stopped changing, the next step is the last one. So an exit costs an evaluation like any other, and no
row or token has more evaluations than the plan.

Confident Adaptive Language Modeling (Schuster et al. 2022, arXiv 2207.07061) skips the remaining layers and copies the
state; here the field is evaluated once more, with a step as long as the rest of the depth. That step may be longer than
any in training: its cost is in docs/inference.md ("Early exits").
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from odelm import ode
from odelm.arguments import number
from odelm.config import ModelConfig
from odelm.errors import InputError, nearest
from odelm.models.arrays import constrain
from odelm.models.field import BlockField, TimedCondition
from odelm.models.lanes import joined
from odelm.models.lm import CausalLM, Classifier, MaskedLM
from odelm.models.transformer import DepthPlan, SharedTransformer
from odelm.ode.dtypes import at_least_float32
from odelm.ode.solver import EULER

MEASURES = ("state", "prediction")
FEWEST_STEPS = 4
"""The fewest steps of a group's stretch of which an exit can save any: two steps show a difference, and the last one is
always taken."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EarlyExit:
    """The rule for when the rest of the depth is crossed in one step.

    Raises InputError for a tolerance that is not above 0, and for an unknown measure.
    """

    tolerance: float | jax.Array
    """The value of the measure up to which the state, or the prediction, counts as settled."""
    measure: str = dataclasses.field(default="state", metadata=dict(static=True))
    """"state": the estimated error of the step, as a share of the state, both as root mean squares.
    "prediction": the total variation distance between the predictions before and after a step, from 0 to 1."""

    def __post_init__(self) -> None:
        # JAX also makes rules whose tolerance is traced, or stands for one.
        if isinstance(self.tolerance, int | float | np.number | str):
            self.check()
        if self.measure not in MEASURES:
            raise InputError(f"the measure of early exits is {self.measure!r}; {nearest(self.measure, MEASURES)}")

    def check(self) -> None:
        """Raises InputError for a tolerance that is neither a number above 0 nor traced."""
        if not isinstance(self.tolerance, Tracer):
            number("an early exit's tolerance", self.tolerance, lambda x: x > 0, "a number above 0, such as 0.1")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Walk:
    """B rows, or the L tokens of each, on their way across one block's stretch of depth time, all at the same step.

    Arrays with a value for each row are (B, 1), those with a value for each token (B, L).
    """

    left: jax.Array
    """float32 (), the time that is left."""
    size: jax.Array
    """float32 (), the size of the last step; 0 before the first."""
    previous: jax.Array
    """The state before the last step; before the first, any state."""
    predicted: jax.Array | None
    """float32 (B, L, V) or (B, 1, outputs), the probabilities read after it; None where the state is measured."""
    last: jax.Array
    """bool: whether the next step crosses the rest."""
    done: jax.Array
    """bool: whether the end was reached."""
    evaluations: jax.Array
    """int32, how often the field was evaluated."""


@dataclass(frozen=True, eq=False)
class Leaving:
    """A block's field whose step size can differ between rows, or tokens."""

    field: BlockField
    model: SharedTransformer
    rule: EarlyExit
    real: jax.Array | None = None
    """bool (B, L), the tokens whose state counts; None is all."""
    fine: jax.Array | None = None
    """bool, with a value for each row or token: those that may not leave the fine steps; None is none."""

    def step(
        self, condition: TimedCondition, h: jax.Array, dt: jax.Array, walk: Walk, slots: Any = None
    ) -> tuple[jax.Array, Walk, Any]:
        """Returns the state after a step of `dt`, or across the rest where the step is the last; rows or tokens that
        are done keep theirs.

        `slots` has the keys and values that attention reads and writes, and is returned updated.
        """
        size = jnp.where(walk.last, walk.left, dt)
        moved, slots = self.field.block.step(
            condition=condition[0], h=constrain(h), dt=_beside(size, h), view=self.field.view, memory=slots
        )
        moved = constrain(jnp.where(_beside(walk.done, h), h, moved.astype(h.dtype)))
        after = Walk(
            walk.left - dt, dt, h, None if walk.predicted is None else predict(self.model, moved),
            walk.last, walk.done | walk.last, walk.evaluations + (~walk.done).astype(jnp.int32),
        )  # fmt: skip
        settled = (walk.size > 0) & (self._score(walk, after, moved) <= self.rule.tolerance)
        if self.fine is not None:
            settled &= ~self.fine
        return moved, dataclasses.replace(after, last=walk.last | settled), slots

    def _score(self, before: Walk, after: Walk, h: jax.Array) -> jax.Array:
        """Returns the measure that is compared with the tolerance, for each row or token; it is meaningless for those
        that take the step across the rest, or have taken it."""
        if before.predicted is not None and after.predicted is not None:
            return self._mean(jnp.abs(after.predicted - before.predicted).sum(-1) / 2, before)
        wide = at_least_float32(h.dtype)
        first, middle, newest = (x.astype(wide) for x in (before.previous, after.previous, h))
        size = jnp.where(before.size > 0, before.size, after.size)
        # The slopes are those at the midpoints of the two steps.
        second = ((newest - middle) / after.size - (middle - first) / size) / ((size + after.size) / 2)
        error = jnp.square(after.left**2 / 2 * second)
        over = tuple(range(2, h.ndim))
        errors, states = (self._mean(x.mean(over), before) for x in (error, jnp.square(h.astype(error.dtype))))
        return jnp.sqrt(errors / states)

    def _mean(self, x: jax.Array, walk: Walk) -> jax.Array:
        """Returns `x` (B, L) unchanged for a walk by token, and its mean over real tokens, (B, 1), for one by row."""
        if walk.done.shape == x.shape:
            return x
        if self.real is None or x.shape[1] == 1:
            return x.mean(axis=1, keepdims=True)
        return jnp.where(self.real, x, 0).sum(axis=1, keepdims=True) / self.real.sum(axis=1, keepdims=True)


def counts_that_save(config: ModelConfig, counts: Iterable[int]) -> list[int]:
    """Returns the counts of steps over the core from which an early exit can save any; InputError if there are none."""
    found = [count for count in counts if count // config.groups >= FEWEST_STEPS]
    if not found:
        least = FEWEST_STEPS * config.groups
        raise InputError(f"early exits save nothing from fewer than {least} steps; give more of them")
    return found


def start_walk(model: SharedTransformer, rule: EarlyExit, h: jax.Array, part: ode.Plan, evaluations: jax.Array) -> Walk:
    """Returns the walk of states (B, L, ..) at the beginning of a stretch, after so many `evaluations`, int32 (B, 1) or
    (B, L)."""
    no = jnp.zeros(evaluations.shape, bool)
    predicted = None if rule.measure == "state" else jnp.zeros_like(predict(model, h))
    return Walk(part.sizes.sum(), jnp.zeros_like(part.sizes[0]), h, predicted, no, no, evaluations)


def predict(model: SharedTransformer, h: jax.Array) -> jax.Array:
    """Returns the probabilities that would be read if the depth ended here, float32 (B, L, V), or (B, 1, outputs) of a
    classifier."""
    h = joined(h) if h.ndim == 4 else h
    probabilities = jax.nn.softmax(model.readout(model._end(h)))
    return probabilities if probabilities.ndim == 3 else probabilities[:, None]


def check_exits(model: SharedTransformer, plan: DepthPlan, rule: EarlyExit) -> None:
    """Raises InputError for a plan of another method than Euler's, and for predictions that the model does not make."""
    if not isinstance(rule, EarlyExit):
        raise InputError(f"early_exit is {rule!r}, expected odelm.EarlyExit, such as odelm.EarlyExit(0.1)")
    rule.check()
    if any(part.solver is not None or part.tableau != EULER for part in plan):
        raise InputError("early exits are from steps of Euler's method: leave out the solver and the integrator")
    if model.config.kv_span > 1:
        raise InputError(
            f"model.kv_span is {model.config.kv_span}: early exits need keys and values of every time, kv_span 1"
        )
    if rule.measure == "prediction" and not isinstance(model, CausalLM | MaskedLM | Classifier):
        raise InputError(
            f"early exits by predictions need a model that makes some, not {type(model).__name__}: measure the state"
        )
    if rule.measure == "prediction" and isinstance(model, Classifier) and model.head.out.out_features == 1:
        raise InputError("a regression predicts no probabilities that could settle: measure the state")


def _beside(x: jax.Array, h: jax.Array) -> jax.Array:
    """Returns (B, 1) or (B, L) with trailing axes of size 1, so that it broadcasts over a state."""
    return x.reshape(*x.shape, *(1,) * (h.ndim - x.ndim))

"""Which times each block crosses: a grid over the core, cut between its groups, with prelude and coda at its ends."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.core import Tracer

from odelm.arguments import whole
from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.ode import grid as grids
from odelm.ode.plan import Plan, padded

Grid = Sequence[float] | np.ndarray | jax.Array


class Crossing(Protocol):
    """A way to cross the core of a model, such as an `odelm.profile.Profile`."""

    @property
    def grid(self) -> tuple[float, ...]: ...

    @property
    def solver(self) -> str: ...


def in_one_shape(plans: Sequence[tuple[Plan, ...]]) -> list[tuple[Plan, ...]]:
    """Returns the plans with each block's steps padded to the most that any of them takes (`odelm.ode.plan.padded`), so
    that one compiled program serves all."""
    most = [max(len(part.sizes) for part in parts) for parts in zip(*plans, strict=True)]
    fewest = [min(len(part.sizes) for part in parts) for parts in zip(*plans, strict=True)]
    return [
        tuple(part if few == many else padded(part, many) for part, few, many in zip(plan, fewest, most, strict=True))
        for plan in plans
    ]


def evaluations_of(plan: Iterable[Plan]) -> int:
    """Returns how many block evaluations it takes to follow the plans of all blocks."""
    return sum(part.evaluations for part in plan)


def stretches(config: ModelConfig, steps: int | None, grid: Grid | None) -> list[Grid]:
    """Returns the times of every block in turn, for `steps` equal steps over the core or a `grid` over it.

    Raises InputError if both are given, for steps that do not spread evenly over the groups, and for a grid that is
    invalid for this core. A traced grid is cut into equal shares.
    """
    return with_ends(config, _over_core(config, steps, grid))


def with_ends(config: ModelConfig, core: Sequence[Grid]) -> list[Grid]:
    """Returns the core's stretches between those of prelude and coda, which are a unit step each."""
    unit = np.array([0, 1], np.float32)
    return [*[unit] * config.prelude, *core, *[unit] * config.coda]


def _over_core(config: ModelConfig, steps: int | None, grid: Grid | None) -> list[Grid]:
    core, groups = config.core, config.groups
    if steps is not None and grid is not None:
        raise InputError(f"both steps={steps} and a grid were given; give one")
    if grid is None:
        steps = core if steps is None else whole("steps", steps)
        if steps % groups:
            raise InputError(
                f"steps is {steps}, which does not spread evenly over the model's {groups} groups; "
                f"try {max(groups, round(steps / groups) * groups)}"
                + (", or share its layers first (init.groups)" if groups == core > 1 else "")
            )
        grid = grids.equal(core, steps)
    elif not isinstance(grid, Tracer):
        grid = grids.checked(np.asarray(grid), core, groups)
        return list(grids.cut(grid, grids.boundaries(core, groups)))
    share, rest = divmod(len(grid) - 1, groups)
    if rest:
        raise InputError(
            f"a traced grid has {len(grid) - 1} steps, which are no equal shares of the model's {groups} groups; "
            f"give a multiple of {groups}, or a grid of known values"
        )
    return [grid[g * share : (g + 1) * share + 1] for g in range(groups)]

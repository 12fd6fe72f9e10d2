"""How pre-training draws its depth steps, and the counts of steps that follow from a model's depth."""

from dataclasses import dataclass

from odelm.config.checks import check_types, choice, divides, freeze_lists, positive
from odelm.config.describe import described
from odelm.config.model import ModelConfig
from odelm.errors import InputError

SAMPLINGS = ("fixed", "random_sizes", "random_count")


@described
@dataclass(frozen=True)
class StepSamplingConfig:
    """How pre-training draws its depth steps, once an update (see `odelm.ode.grid`)."""

    kind: str = "random_count"
    """`fixed`: unit steps. `random_sizes`: sizes i.i.d. U(low, high), scaled to span the depth.
    `random_count`: a count drawn from `counts`, equal steps."""
    counts: tuple[int, ...] = ()
    """Numbers of steps to draw from, up to full depth; each must divide evenly over the groups. Empty is those nearest
    to full depth, a half, a third and a quarter of it in evaluations; with `anneal`, counts from full depth to a
    quarter of it, each about a fifth below the last."""
    weights: tuple[float, ...] = ()
    """Relative probability of each count; empty is uniform."""
    low: float = 0.5
    """Of `random_sizes`: the smallest size before scaling."""
    high: float = 1.5
    """Of `random_sizes`: the largest."""
    jitter: float = 0.0
    """Of `random_count`: relative half-width of a uniform perturbation of the step sizes, 0 to below 1."""
    anneal: float = 0.0
    """Share of the updates over which the counts are let in one by one, the largest first; 0 draws from all at once.
    A model trained with unit steps may lose all that it learned if it meets steps of four at once. A run resumed with
    more updates lets them in by the new number."""
    few_first: float = 0.0
    """Share of the updates, the first ones, in which only the smaller half of the counts is drawn; 0 draws from all at
    once. Updates of few steps are cheap, and more of them fit into the same time. For steps this is ours; for depth see
    progressive stacking, Gong et al. 2019, ICML."""
    fine_last: float = 0.0
    """Share of the updates, the last ones, in which only the larger half of the counts is drawn (ours)."""

    def __post_init__(self) -> None:
        freeze_lists(self)

    def validate(self, model: ModelConfig, *, saved: bool = False) -> "StepSamplingConfig":
        check_types(self, "step_sampling")
        choice("step_sampling.kind", self.kind, SAMPLINGS)
        if self.kind != "fixed":
            for count in self.counts:
                positive("step_sampling.counts", count)
                divides("model.groups", model.groups, "a count in step_sampling.counts", count)
            counts = self.counts_of(model)
            if max(counts) > model.core and not saved:
                raise InputError(
                    f"step_sampling.counts has {max(counts)}, more than full depth, {model.core} steps; leave it empty "
                    f"for {', '.join(map(str, self.__class__(anneal=self.anneal).counts_of(model)))}"
                )
            if counts == (model.core,) and not self.counts:
                raise InputError(
                    f"step_sampling.kind is {self.kind!r}, but {model.groups} groups and a core of {model.core} leave "
                    "no other count of steps: share the layers among fewer blocks (model.groups, or init.groups of an "
                    "existing model), or set step_sampling.kind='fixed'"
                )
            if self.weights and len(self.weights) != len(counts):
                raise InputError(
                    f"step_sampling.weights has {len(self.weights)} entries, expected one for each of the "
                    f"{len(counts)} counts, or none"
                )
            if any(weight < 0 for weight in self.weights) or (self.weights and sum(self.weights) <= 0):
                raise InputError(f"step_sampling.weights is {self.weights}, expected non-negative, not all zero")
        if not 0.0 < self.low <= self.high:
            raise InputError(f"step_sampling.low, high are {self.low}, {self.high}, expected 0 < low <= high")
        if not 0.0 <= self.jitter < 1.0:
            raise InputError(f"step_sampling.jitter is {self.jitter}, expected at least 0 and below 1")
        if not 0.0 <= self.anneal <= 1.0:
            raise InputError(f"step_sampling.anneal is {self.anneal}, expected a share of the updates, 0 to 1")
        for name in ("few_first", "fine_last"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(
                    f"step_sampling.{name} is {getattr(self, name)}, expected a share of the updates, 0 to 1"
                )
        if max(self.few_first, self.anneal) + self.fine_last > 1.0:
            raise InputError(
                f"step_sampling.fine_last is {self.fine_last}, which leaves too few updates to few_first "
                f"({self.few_first}) and anneal ({self.anneal}): expected shares that add up to 1 or less"
            )
        if self.few_first and self.anneal:
            raise InputError("step_sampling.few_first begins with few steps and anneal with many: set one of them to 0")
        return self

    def counts_of(self, model: ModelConfig) -> tuple[int, ...]:
        """Returns the step counts that random sampling draws from."""
        return self.counts or (annealed_steps(model) if self.anneal else default_steps(model))


def default_steps(model: ModelConfig) -> tuple[int, ...]:
    """Returns the steps over the core whose evaluations come nearest to 1, 1/2, 1/3 and 1/4 of the depth.

    Multiples of `groups`, and full depth first; of two that are equally near, the fewer.
    """
    counts = range(model.groups, model.core + 1, model.groups)

    def distance(count: int, part: int) -> tuple[int, int]:
        return abs(part * (model.ends + count) - model.depth), count

    found = {min(counts, key=lambda count: distance(count, part)) for part in (1, 2, 3, 4)}
    return tuple(sorted(found, reverse=True))


def annealed_steps(model: ModelConfig) -> tuple[int, ...]:
    """Returns full depth and counts down to a quarter of its evaluations, each about a fifth below the last."""
    groups, counts = model.groups, [model.core]
    last = max(groups, -(-(model.depth - 4 * model.ends) // (4 * groups)) * groups)
    while counts[-1] > last:
        counts.append(max(last, int(0.8 * counts[-1]) // groups * groups))
    return tuple(counts)

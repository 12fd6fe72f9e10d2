"""The optimiser, its rate over the updates, and the mean of the parameters."""

from dataclasses import dataclass

from odelm.config.checks import check_types, choice, within
from odelm.config.describe import described
from odelm.errors import InputError

OPTIMIZERS = ("adamw", "muon")
DECAYS = ("cosine", "linear", "stable", "constant")


@described
@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with linear warm-up, a decay, and clipping by global norm."""

    kind: str = "adamw"
    """`adamw`, or `muon`: Muon for the matrices of the blocks, AdamW for all else."""
    learning_rate: float = 3e-3
    """The peak, of AdamW."""
    muon_learning_rate: float = 0.02
    """The peak, of Muon; it rises and falls as the other does."""
    muon_momentum: float = 0.95
    """Decay of Muon's mean of gradients."""
    warmup: int = 100
    """Updates over which the rate rises: before the peak it is a `warmup + 1`th part of it more every time."""
    warmup_from_zero: bool = False
    """Whether the first update has rate 0, as runs of version 0.1 had it, and so changes nothing."""
    decay: str = "cosine"
    """How the rate falls after its peak: `cosine`, `linear`, not at all (`constant`), or only at the end (`stable`), so
    that a run can be continued from before the fall (Hägele et al. 2024, arXiv 2405.18392)."""
    decay_share: float = 0.2
    """Of `stable`: the share of the updates, the last ones, in which the rate falls, linearly."""
    final_fraction: float = 0.1
    """The rate after the last update, as a share of the peak."""
    b1: float = 0.9
    """Decay of the mean of gradients."""
    b2: float = 0.95
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of that mean before it divides."""
    weight_decay: float = 0.1
    """Applied to matrices, not to vectors (norm scales, biases)."""
    clip_norm: float = 1.0
    """Gradients of a larger global norm are scaled down to it."""
    average: float = 0.0
    """Decay of a running mean of the parameters, such as 0.999, which is then what is evaluated and loaded; 0 is none.
    The mean follows faster at first: after n updates its decay is at most (1 + n) / (10 + n). Averages of iterates:
    Polyak & Juditsky 1992; exponential ones, as here: Kingma & Ba 2015, arXiv 1412.6980, section 7.2."""

    def validate(self) -> "OptimizerConfig":
        check_types(self, "optimizer")
        choice("optimizer.kind", self.kind, OPTIMIZERS)
        choice("optimizer.decay", self.decay, DECAYS)
        for name in ("learning_rate", "muon_learning_rate", "clip_norm", "eps"):
            if getattr(self, name) <= 0:
                raise InputError(f"optimizer.{name} is {getattr(self, name)}, expected a positive number")
        for name in ("b1", "b2", "muon_momentum", "final_fraction", "decay_share"):
            within(f"optimizer.{name}", getattr(self, name), 0.0, 1.0)
        if not 0.0 <= self.average < 1.0:
            raise InputError(f"optimizer.average is {self.average}, expected at least 0 and below 1")
        for name in ("weight_decay", "warmup"):
            if getattr(self, name) < 0:
                raise InputError(f"optimizer.{name} is {getattr(self, name)}, expected 0 or more")
        return self

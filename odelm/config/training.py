"""How a model is trained: draws of depth steps, the optimiser, the cadence, the devices, and where training starts."""

from dataclasses import dataclass

from odelm.config.checks import check_types, choice, divides, freeze_lists, positive, within
from odelm.config.describe import described
from odelm.config.model import ModelConfig
from odelm.errors import InputError

SAMPLINGS = ("fixed", "random_sizes", "random_count")
OPTIMIZERS = ("adamw", "muon")
DECAYS = ("cosine", "linear", "stable", "constant")
MERGES = ("mean", "layer", "low_rank")
OVERRIDABLE = ("time_modulation", "dropout", "attention", "dtype", "residual_dtype")
"""The options of `model` that count where the model is that of `init.from_pretrained`."""

REMAT_POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)
"""The `jax.checkpoint_policies` that say what of a step is kept for the gradient; the rest is computed again."""


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
    once. Updates of few steps are cheap, and more of them fit into the same time."""

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
        if not 0.0 <= self.few_first <= 1.0:
            raise InputError(f"step_sampling.few_first is {self.few_first}, expected a share of the updates, 0 to 1")
        if self.few_first and self.anneal:
            raise InputError("step_sampling.few_first begins with few steps and anneal with many: set one of them to 0")
        return self

    def counts_of(self, model: ModelConfig) -> tuple[int, ...]:
        """Returns the step counts that random sampling draws from."""
        return self.counts or (annealed_steps(model) if self.anneal else default_steps(model))


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
    The mean follows faster at first: after n updates its decay is at most (1 + n) / (10 + n)."""

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


@described
@dataclass(frozen=True)
class TrainConfig:
    """How long to train, on how much at a time, and when to look and to save."""

    updates: int = 600
    """How many to make; raise it to continue a finished run."""
    batch_size: int = 16
    """Sequences an update, over all devices and processes together."""
    accumulate: int = 1
    """In how many parts a batch is computed, one after the other: less memory, and the same update."""
    z_loss: float = 0.0
    """What the squared logarithm of the softmax's sum weighs in what is minimised, such as 1e-4: keeps logits small."""
    length: int = 128
    """Tokens a sequence."""
    eval_every: int = 200
    """Updates between evaluations; there is always one after the last update."""
    eval_batches: int = 16
    """Held-out batches an evaluation; 0 is the whole held-out split."""
    eval_steps: tuple[int, ...] = ()
    """Step counts to evaluate at; empty is those nearest to full depth, 1/2, 1/3 and 1/4 of it in evaluations."""
    checkpoint_every: int = 200
    """Updates between checkpoints; there is always one after the last update."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_every: int = 0
    """Checkpoints after a multiple of so many updates stay too; 0 is none."""
    keep_minutes: float = 0.0
    """One checkpoint for every so many minutes stays too; 0 is none."""
    keep_best: int = 0
    """So many of those checkpoints stay too at which the held-out loss at full depth was lowest, of those made after an
    update that was evaluated; 0 is none."""
    max_nonfinite: int = 10
    """An update whose loss or gradient is not finite is skipped; after so many in a row the run ends."""
    log_every: int = 10
    """Updates between records of the loss and the speed."""
    seed: int = 0
    """Of parameters, order of the text, masks, dropout and drawn steps."""
    unroll: bool = True
    """Unroll the depth loop: faster updates on every backend, longer compilation."""
    remat: str | None = None
    """What of a depth step is kept for the gradient, while the rest is computed again to save memory: one of
    `odelm.config.REMAT_POLICIES`, which are JAX's; None keeps everything, without more work."""

    def __post_init__(self) -> None:
        freeze_lists(self)

    def validate(self, model: ModelConfig) -> "TrainConfig":
        check_types(self, "train")
        for name in (
            "updates",
            "batch_size",
            "length",
            "eval_every",
            "checkpoint_every",
            "keep",
            "log_every",
            "max_nonfinite",
        ):
            positive(f"train.{name}", getattr(self, name))
        positive("train.accumulate", self.accumulate)
        divides("train.accumulate", self.accumulate, "train.batch_size", self.batch_size)
        if self.z_loss < 0:
            raise InputError(f"train.z_loss is {self.z_loss}, expected 0 or more")
        if self.remat is not None:
            choice("train.remat", self.remat, REMAT_POLICIES)
        for name in ("keep_every", "keep_minutes", "keep_best"):
            if getattr(self, name) < 0:
                raise InputError(f"train.{name} is {getattr(self, name)}, expected 0 (none) or more")
        if self.eval_batches < 0:
            raise InputError(f"train.eval_batches is {self.eval_batches}, expected 0 (all) or more")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"train.seed is {self.seed}, expected 0 to 2**31 - 1")
        if self.length > model.max_length:
            raise InputError(
                f"train.length is {self.length}, but model.max_length is {model.max_length}: "
                "shorten the one or raise the other"
            )
        for steps in self.eval_steps:
            positive("train.eval_steps", steps)
            divides("model.groups", model.groups, "a count in train.eval_steps", steps)
        return self


@described
@dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work."""

    data: int = -1
    """Devices along the batch, each with all parameters; -1, of one of the three, is what the others leave."""
    fsdp: int = 1
    """Devices along the batch that share out parameters and optimiser state, and gather what they need."""
    tensor: int = 1
    """Devices that share out heads, hidden units and the vocabulary."""

    @property
    def axes(self) -> dict[str, int]:
        """The size of each axis, from the outermost."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    def shown(self) -> str:
        """Returns the axes as text."""
        return ", ".join(f"mesh.{name}={size}" for name, size in self.axes.items())

    def validate(self) -> "MeshConfig":
        check_types(self, "mesh")
        for name, size in self.axes.items():
            if size != -1:
                positive(f"mesh.{name}", size)
        if list(self.axes.values()).count(-1) > 1:
            raise InputError(f"the mesh is {self.shown()}, expected -1, which takes what is left, of one axis only")
        return self


@described
@dataclass(frozen=True)
class InitConfig:
    """An existing model as the starting point, in place of new parameters, and how its blocks are shared."""

    from_pretrained: str = ""
    """A Hugging Face folder (ALBERT, BERT, GPT-2) or a run directory; empty starts from new parameters. The model is
    then that one's: of `model` only the options of `OVERRIDABLE` count."""
    groups: int | None = None
    """How many blocks to share its layers among, those of prelude and coda left out; None keeps its own."""
    prelude: int | None = None
    """How many of its first layers stay blocks of their own, before the shared core; None keeps the model's."""
    coda: int | None = None
    """How many of its last layers stay blocks of their own, after the shared core; None keeps the model's."""
    merge: str = "mean"
    """What a shared block starts as: the `mean` of the layers that it replaces, one `layer` of them, or their mean
    with a `low_rank` residual for each of them, kept as a function of time."""
    layer: int = 0
    """Of `layer`: which one of its stretch, from 0; negative counts from the last."""
    rank: int = 16
    """Of `low_rank`: the rank of a residual."""

    def validate(self) -> "InitConfig":
        check_types(self, "init")
        choice("init.merge", self.merge, MERGES)
        positive("init.rank", self.rank)
        if self.groups is not None:
            positive("init.groups", self.groups)
        for name in ("prelude", "coda"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"init.{name} is {value}, expected 0 or more layers of init.from_pretrained")
            if value is not None and self.groups is None:
                raise InputError(
                    f"init.{name} is {value}, but init.groups is None: say how many blocks to share the others among"
                )
        if self.groups is None and self.merge != "mean":
            raise InputError(
                f"init.merge is {self.merge!r}, but init.groups is None: say how many blocks to share among"
            )
        if self.groups is not None and not self.from_pretrained:
            raise InputError("init.groups shares the layers of init.from_pretrained, which is empty: give a folder")
        return self


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

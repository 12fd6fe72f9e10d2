"""How a model is trained: how long, on how much at a time, when to look and to save, and over which devices."""

from dataclasses import dataclass

from odelm.config.checks import check_types, choice, divides, freeze_lists, positive
from odelm.config.describe import described
from odelm.config.model import ModelConfig
from odelm.errors import InputError

REMAT_POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)
"""The `jax.checkpoint_policies` that say what of a step is kept for the gradient; the rest is computed again."""


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
    distill: float = 0.0
    """Share of an update of few steps that learns what the model itself predicts at full depth, in place of the text;
    0 is none. Such an update costs a pass over the full depth more. Inplace distillation: Yu & Huang 2019, arXiv
    1903.05134."""
    distill_from: float = 0.5
    """Of `distill`: the share of the updates after which it begins, when full depth has something to teach."""
    teacher: str = ""
    """A run, bundle or folder with the same tokenizer, shared or not, whose predictions `distill` learns in place of
    those of the model itself, in updates of full depth too. It may be larger; with it 0 is usual for `distill_from`."""
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
    watch: bool = False
    """Each evaluation also records the norms of state and field along the depth, the held-out loss of each component of
    the corpus, and an image of the loss over steps: more to look at, and a program more to compile."""
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
        for name in ("distill", "distill_from"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"train.{name} is {getattr(self, name)}, expected a share, 0 to 1")
        if self.teacher and not self.distill:
            raise InputError(
                f"train.teacher is {self.teacher!r}, but train.distill is 0, which learns nothing of it: give a share, "
                "such as 0.5, and train.distill_from, such as 0"
            )
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

"""Where training starts: new parameters, or an existing model."""

from dataclasses import dataclass

from odelm.config.checks import check_types, choice, positive
from odelm.config.describe import described
from odelm.errors import InputError

MERGES = ("mean", "layer", "low_rank")
OVERRIDABLE = ("time_modulation", "kv_span", "dropout", "attention", "dtype", "residual_dtype")
"""The options of `model` that count where the model is that of `init.from_pretrained`."""


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
    max_length: int | None = None
    """Its longest sequence from here on, in tokens; None keeps the model's. Learned positions begin again after its own
    (Beltagy et al. 2020, arXiv 2004.05150, section 5)."""
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
        if self.max_length is not None:
            positive("init.max_length", self.max_length)
            if not self.from_pretrained:
                raise InputError("init.max_length is of init.from_pretrained, which is empty: give model.max_length")
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

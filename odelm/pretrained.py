"""A model from wherever it is, a run directory or a Hugging Face folder, and as the start of another training."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flax import nnx

from odelm import checkpoint, interop, rng
from odelm.config import OVERRIDABLE, Config, InitConfig, ModelConfig
from odelm.errors import InputError
from odelm.interop.family import Model
from odelm.models import CausalLM, MaskedLM
from odelm.models.parameters import parameters
from odelm.models.remake import grafted, remade

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load(
    path: str | Path, *, step: int | None = None, adjust: Callable[[Config], Config] | None = None
) -> tuple[Model, Config, "Tokenizer | None"]:
    """Returns (model, config, tokenizer) of a run directory or of a Hugging Face folder.

    Args:
        step: of a run, which checkpoint; None is the newest.
        adjust: changes the config before the model is made; of a folder only its dtypes are taken.

    The tokenizer is None for a folder without a `tokenizer.json`. Raises InputError, naming what is missing or does
    not fit, for what is neither.
    """
    path = Path(path).expanduser()
    if not interop.is_folder(path):
        return checkpoint.load(path, step=step, adjust=adjust)
    if step is not None:
        raise InputError(f"step={step} was given, but {path} is a Hugging Face folder, which has no checkpoints")
    options = adjust(Config()).model if adjust else None
    return interop.load(path, options=options)


@dataclass(frozen=True)
class Start:
    """Where a training begins that does not begin from new parameters."""

    model: CausalLM | MaskedLM
    tokenizer: Path | None
    """The source's tokenizer.json."""
    summary: str
    """One sentence on what was taken and what was shared."""


def adopted(options: ModelConfig, source: ModelConfig) -> ModelConfig:
    """Returns the source's config with the options that a recipe may still choose (`odelm.config.OVERRIDABLE`)."""
    return dataclasses.replace(source, **{name: getattr(options, name) for name in OVERRIDABLE})


def starting_point(config: Config) -> Start:
    """Returns the model of `config.init`, its blocks shared as that says and told their time as `config.model` says.

    What the source has not (time modulation) begins without effect, so that the model gives the source's logits
    until it is trained. Raises InputError for a source that cannot be read or is no language model.
    """
    init = config.init
    source, _, _ = load(init.from_pretrained)
    if not isinstance(source, CausalLM | MaskedLM):
        raise InputError(
            f"{init.from_pretrained} is a {type(source).__name__}, which has no head to go on training its objective "
            "with; give a folder of the language model"
        )
    rngs = nnx.Rngs(rng.key(config.train.seed, "init"))
    model, shared = source, ""
    if _shares(init, source.config):
        model = interop.shared(source, init, rngs=rngs)
        shared = "; " + interop.summary(source.config, model, init)
    options = adopted(config.model, model.config)
    if model.config.time_modulation and not options.time_modulation:
        raise InputError(
            f"{init.from_pretrained} is told its time, but model.time_modulation is False: leave it True, "
            "or export the run first, which works the time into separate layers"
        )
    model = grafted(remade(model, options, rngs=rngs), parameters(model))
    file = Path(init.from_pretrained).expanduser() / checkpoint.TOKENIZER
    kind = f"{options.kind} of depth {options.depth}, groups {options.groups}"
    if options.sentence_order:
        kind += ", its second head trained on the order of segments"
    return Start(model, file if file.is_file() else None, f"starts from {init.from_pretrained} ({kind}{shared})")


def _shares(init: InitConfig, source: ModelConfig) -> bool:
    if init.groups is None:
        return False
    asked = (init.groups, init.prelude or 0, init.coda or 0)
    return asked != (source.groups, source.prelude, source.coda) or init.merge != "mean"

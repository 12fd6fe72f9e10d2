"""What a training starts from: new parameters, a pretrained model, or its own earlier checkpoint."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from odelm import interop, pretrained, rng, shipped
from odelm.checkpoint_files import CheckpointFiles
from odelm.config import OVERRIDABLE, TASKS, Config, InitConfig, ModelConfig
from odelm.errors import InputError
from odelm.interop.family import Model
from odelm.models import CausalLM, Classifier, MaskedLM
from odelm.models.parameters import like, load_parameters, parameters
from odelm.run_directory import TOKENIZER, RunDirectory


@dataclass(frozen=True)
class Pretrained:
    """A model, made ready to be trained further."""

    model: CausalLM | MaskedLM | Classifier
    tokenizer: Path | None
    """The tokenizer.json beside the model."""
    end_token: str
    """The token that ends a text by the model's folder; empty for the usual names."""
    summary: str
    """One sentence: the model's source, its shape, and how its layers were shared."""


@dataclass(frozen=True)
class Start:
    """A validated config whose `model` is the model that is trained, and where its parameters come from."""

    config: Config
    pretrained: Pretrained | None = None
    """The model that `config.init` names; None without one, and once the run has a checkpoint of its own."""
    tokenizer: Path | None = None
    """The tokenizer that must be used; None if `config.data` chooses it."""


def find_start(config: Config, directory: RunDirectory) -> Start:
    """Returns where the run in `directory` starts from, with the model of `config.init` in the config.

    Raises InputError for an invalid config, and for a pretrained model that cannot be read or trained, or has no
    tokenizer.
    """
    config = _for_task(config)
    if not config.init.from_pretrained:
        return Start(config.validate(saved=directory.config is not None))
    saved, found = directory.config, None
    resumes = saved is not None and saved.init == config.init and bool(CheckpointFiles(directory.path).steps())
    if saved is not None and saved.init == config.init:
        config = dataclasses.replace(config, model=inherit_options(config.model, saved.model))
        config = _with_end_token(config, saved.data.end_token)
    if not resumes:
        found = init_from_pretrained(config)
        config = dataclasses.replace(config, model=found.model.config)
        config = _with_end_token(config, found.end_token)
    config.validate(saved=saved is not None)
    return Start(config, found, _tokenizer(config, found, directory))


def _for_task(config: Config) -> Config:
    """Returns the config with a classifier of the task's outputs as its model; without a task it stays as it is.

    Raises InputError for a classifier without a task.
    """
    if not config.data.task:
        if config.model.outputs:
            raise InputError(f"model.outputs is {config.model.outputs}, but a classifier is trained on a data.task")
        return config
    config.data.validate()
    if config.model.kind != "encoder" or config.model.outputs:
        return config  # `Config.validate` reports what is wrong with it, if no other model replaces it.
    model = dataclasses.replace(config.model, outputs=TASKS[config.data.task].outputs, sentence_order=False)
    return dataclasses.replace(config, model=model)


def _with_end_token(config: Config, name: str) -> Config:
    """Returns the config with the end token of the tokenizer that comes with a model, unless it has its own."""
    if config.data.tokenizer or config.data.end_token:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, end_token=name))


def _tokenizer(config: Config, found: Pretrained | None, directory: RunDirectory) -> Path | None:
    if config.data.tokenizer:
        return None
    if found is None:
        return directory.tokenizer
    if found.tokenizer is None:
        raise InputError(
            f"{config.init.from_pretrained} has no {TOKENIZER}: save it there with the tokenizers or "
            "transformers library (a fast tokenizer's save_pretrained), or give --config.data.tokenizer"
        )
    return found.tokenizer


def inherit_options(options: ModelConfig, source: ModelConfig) -> ModelConfig:
    """Returns the source's config with the options that a recipe may still choose (`odelm.config.OVERRIDABLE`)."""
    return dataclasses.replace(source, **{name: getattr(options, name) for name in OVERRIDABLE})


def init_from_pretrained(config: Config) -> Pretrained:
    """Returns the model of `config.init`, with its blocks shared as `config.init` says, and time modulation as
    `config.model` says.

    Newly added parameters (time modulation) are initialised so that the logits are the source's until the model is
    trained. For a task its head becomes that of a classifier. Raises InputError for a source that cannot be read, is
    not a language model, or is not an encoder although there is a task.
    """
    init = config.init
    source, described, _ = pretrained.load(init.from_pretrained, with_profile=False)
    _check_source(source, config)
    rngs = nnx.Rngs(rng.key(config.train.seed, "init"))
    model, shared = source, ""
    if _shares(init, source.config):
        model = interop.shared(source, init, rngs=rngs)
        shared = "; " + interop.summary(source.config, model, init)
    options = inherit_options(config.model, model.config)
    if model.config.time_modulation and not options.time_modulation:
        raise InputError(
            f"{init.from_pretrained} was trained with model.time_modulation=True and needs it; set it to True, or "
            "export the run first (that folds the modulation into the weights of separate layers)"
        )
    options = dataclasses.replace(options, max_length=init.max_length or options.max_length)
    model = load_parameters(like(model, options, rngs=rngs), _with_length(parameters(model), options.max_length))
    model = _as_trained(model, config, rngs)
    file = shipped.found(init.from_pretrained) / TOKENIZER
    kind = f"{options.kind} of depth {options.depth}, groups {options.groups}"
    if config.data.task:
        kind += f", as a classifier of {config.data.task}"
    elif options.sentence_order:
        kind += ", its second head trained on the order of segments"
    summary = f"starts from {init.from_pretrained} ({kind}{shared})"
    return Pretrained(model, file if file.is_file() else None, described.data.end_token, summary)


def _check_source(source: Model, config: Config) -> None:
    """Raises InputError for a model that cannot be trained as the config says."""
    name = type(source).__name__
    if config.data.task and source.config.kind != "encoder":
        raise InputError(
            f"{config.init.from_pretrained} is a decoder ({name}), but data.task is {config.data.task!r}: fine-tuning "
            "takes an encoder"
        )
    if not config.data.task and not isinstance(source, CausalLM | MaskedLM):
        raise InputError(
            f"{config.init.from_pretrained} is a {name}, which lacks the head of a language model, so its "
            "training cannot be continued; give a folder of the language model"
        )


def _as_trained(model: Model, config: Config, rngs: nnx.Rngs) -> CausalLM | MaskedLM | Classifier:
    """Returns the model with the head that is trained: for a task that of a classifier, newly initialised except for
    the pooler, if it has one."""
    if config.data.task:
        return Classifier.from_encoder(model, outputs=TASKS[config.data.task].outputs, rngs=rngs)
    assert isinstance(model, CausalLM | MaskedLM)
    return model


def _with_length(arrays: dict[str, jax.Array], length: int) -> dict[str, jax.Array]:
    """Returns the parameters of a model with `length` learned positions, repeated or cut off, if it has any."""
    learned = arrays.get("embed/learned")
    if learned is None or len(learned) == length:
        return arrays
    return arrays | {"embed/learned": learned[jnp.arange(length) % len(learned)]}


def _shares(init: InitConfig, source: ModelConfig) -> bool:
    """Returns whether `init` asks for blocks that the source does not have."""
    if init.groups is None:
        return False
    asked = (init.groups, init.prelude or 0, init.coda or 0)
    return asked != (source.groups, source.prelude, source.coda) or init.merge != "mean"

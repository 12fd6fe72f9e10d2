"""A Hugging Face folder as a model of ours: `config.json` and safetensors in, with nothing left over."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx

from odelm import tokenizer as tokenizers
from odelm.config import Config, DataConfig, ModelConfig, StepSamplingConfig, TrainConfig
from odelm.errors import InputError, nearest
from odelm.interop import folder as files
from odelm.interop import tensors as layouts
from odelm.interop.encoders import ALBERT, BERT
from odelm.interop.family import Family, FolderConfig, Model, number
from odelm.interop.gpt2 import GPT2
from odelm.models import Classifier, Encoder
from odelm.models.parameters import parameters, with_parameters

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FAMILIES = {family.model_type: family for family in (ALBERT, BERT, GPT2)}
Tensors = dict[str, np.ndarray]
WRAPPERS = {"module.": "torch's DataParallel", "_orig_mod.": "torch.compile", "_fsdp_wrapped_module.": "torch's FSDP"}
"""Prefixes of tensor names if a model was saved inside a wrapper."""


@dataclass(frozen=True)
class Folder:
    """What a folder holds."""

    model: Model
    tokenizer: "Tokenizer | None"
    """None where the folder has no tokenizer.json, or one with more tokens than the model."""
    unused: tuple[str, ...]
    """Tensors of heads that the folder's architecture does not use."""
    end_token: str = ""
    """The token that ends a text, as the folder says; empty if it does not."""


def read(path: str | Path, *, options: ModelConfig | None = None) -> Folder:
    """Reads an ALBERT, BERT or GPT-2 folder; parameters become float32.

    The class follows the folder's architecture: `CausalLM`, `MaskedLM`, `Classifier`, or `Encoder` for a bare
    `AlbertModel`. `options` gives the dtypes to compute in, the implementation of attention and `kv_span`. Raises
    InputError, naming what is wrong, for another kind of model, options with no equivalent here, pickled weights, and
    tensors that do not fit the config.
    """
    path = Path(path)
    config = files.read_config(path)
    family = _family(config, path)
    if config.get("quantization_config") is not None:
        raise InputError(f"{path} is quantised (quantization_config in config.json): give the model as it was before")
    made = family.model_config(config).validate()
    if options is not None:
        taken = {name: getattr(options, name) for name in ("dtype", "residual_dtype", "attention", "kv_span")}
        made = dataclasses.replace(made, **taken)
    tensors = files.read_tensors(path)
    # A block has a dozen tensors: nothing is built for a config that claims more blocks than there can be.
    if made.groups * made.inner_blocks > len(tensors):
        raise InputError(f"config.json of {path} says {made.depth} layers, but there are only {len(tensors)} tensors")
    named = _named(family, config, tensors, tied=made.tie_readout)
    model = nnx.eval_shape(_maker(family, config, made, named))
    entries = family.entries(model)
    unused = _set_aside(family, named, {name for entry in entries for name in entry.tensors})
    arrays = layouts.read(
        entries,
        {name: leaf.shape for name, leaf in parameters(model).items()},
        {name: tensor for name, tensor in named.items() if name not in unused},
        place=str(path),
        implied_by=", ".join(f"{field} {config[field]}" for field in family.sizes if field in config),
    )
    device = jax.local_devices()[0]
    model = with_parameters(model, {name: jax.device_put(array, device) for name, array in arrays.items()})
    file = path / files.TOKENIZER
    tokenizer = _fitting(file, made.vocab_size) if file.is_file() else None
    end = "" if tokenizer is None or made.kind != "decoder" else _end_token(path, config, tokenizer)
    return Folder(model, tokenizer, unused, end)


def load(path: str | Path, *, options: ModelConfig | None = None) -> tuple[Model, Config, "Tokenizer | None"]:
    """Returns (model, config, tokenizer) of a folder, as `odelm.load` does of a run. Errors are those of `read`."""
    found = read(path, options=options)
    if found.unused:
        print(f"left out of {path}, for no part of the model uses them: {', '.join(found.unused)}", file=sys.stderr)
    model, file = found.model.config, Path(path) / files.TOKENIZER
    config = Config(
        model=model,
        data=DataConfig(tokenizer=str(file) if found.tokenizer else "", end_token=found.end_token),
        step_sampling=StepSamplingConfig(kind="fixed", counts=()),
        train=TrainConfig(length=min(TrainConfig.length, model.max_length)),
    )
    return found.model, config.validate(), found.tokenizer


def _fitting(file: Path, size: int) -> "Tokenizer | None":
    """Returns the tokenizer; None, and a line on standard error, if it has ids that the model does not."""
    tokenizer = tokenizers.load(file)
    try:
        return tokenizers.check_size(tokenizer, size)
    except InputError as error:
        print(f"{file} is left out, so that no text can be read or written: {error}", file=sys.stderr)
        return None


def _end_token(path: Path, config: FolderConfig, tokenizer: "Tokenizer") -> str:
    """Returns the `eos_token` of the tokenizer's own settings, else the token that is the config's `eos_token_id`.

    Empty if there is none, or if it is the token that `find_id` finds by its name.
    """
    said = _said_end(path, config, tokenizer)
    return "" if tokenizer.token_to_id(said) == tokenizers.find_id(tokenizer, "end") else said


def _said_end(path: Path, config: FolderConfig, tokenizer: "Tokenizer") -> str:
    for name in (files.TOKENIZER_CONFIG, files.SPECIAL_TOKENS):
        said = files.read_json(path / name).get("eos_token") if (path / name).is_file() else None
        token = said.get("content") if isinstance(said, dict) else said
        if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
            return token
    number = config.get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return (tokenizer.id_to_token(number) or "") if isinstance(number, int) and number >= 0 else ""


def _family(config: FolderConfig, path: Path) -> Family:
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"{path} is of model_type {name!r}, which has no equivalent; {nearest(str(name), FAMILIES)}")
    return FAMILIES[name]


def _named(family: Family, config: FolderConfig, tensors: Tensors, *, tied: bool) -> Tensors:
    """Returns the tensors under the names that the entries use: no prefix, nothing twice, nothing without effect."""
    plain = {}
    for given, tensor in tensors.items():
        wrapped = next((prefix for prefix in WRAPPERS if given.startswith(prefix)), None)
        if wrapped:
            raise InputError(
                f"the tensor {given} begins with {wrapped!r}: the model was saved inside {WRAPPERS[wrapped]}; save the "
                "model that is within (model.module, or model._orig_mod), or take the prefix off the names"
            )
        name = given.removeprefix(family.prefix)
        # The oldest folders use TensorFlow's names for the parts of a norm.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name in plain:
            raise InputError(f"the folder has {name} twice, once as {given}: remove one of them")
        if not family.ignored.fullmatch(name):
            plain[name] = tensor
    for twin, name in family.duplicates.items():
        if twin not in plain or not tied:
            continue
        copy = plain.pop(twin)
        # Where two biases differ, transformers adds the decoder's.
        if name.endswith(".bias"):
            plain[name] = copy
        elif not np.array_equal(copy, plain.setdefault(name, copy)):
            raise InputError(f"{twin} differs from {name}, though tie_word_embeddings says that they are one")
    if not tied:
        for twin, name in family.duplicates.items():
            if name.endswith(".bias") and name in plain:
                plain.setdefault(twin, plain.pop(name))
    return family.prepared(config, plain)


def _set_aside(family: Family, tensors: Tensors, used: set[str]) -> tuple[str, ...]:
    """Returns the tensors of heads that the class does not have at all."""
    heads = [head for head in family.heads if not any(name.startswith(head) for name in used)]
    return tuple(sorted(name for name in tensors if name.startswith(tuple(heads))))


def _maker(family: Family, config: FolderConfig, model: ModelConfig, tensors: Tensors) -> Callable[[], Model]:
    """Returns a function that makes a model of the class that the folder's architecture, or its tensors, ask for."""
    names = config.get("architectures") or [_architecture(family, tensors)]
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or name not in family.architectures:
        raise InputError(
            f"config.json says architecture {name!r}, which has no equivalent; "
            f"{nearest(str(name), family.architectures)}"
        )
    made = family.architectures[name]
    if made is Classifier:
        labels = config.get("id2label")
        outputs = number(config, "num_labels", len(labels) if isinstance(labels, dict) else 2)
        return lambda: Classifier(model, outputs=outputs, rngs=nnx.Rngs(0))
    if made is Encoder:
        pooled = any(tensor.startswith("pooler.") for tensor in tensors)
        return lambda: Encoder(model, pooled=pooled, rngs=nnx.Rngs(0))
    config_of_it = dataclasses.replace(model, sentence_order=name.endswith("ForPreTraining"))
    return lambda: made(config_of_it, rngs=nnx.Rngs(0))


def _architecture(family: Family, tensors: Tensors) -> str:
    """Returns the architecture of a folder whose config names none, by its tensors."""
    if family is GPT2:
        return "GPT2LMHeadModel"
    bare, masked, pretraining, classifier = family.architectures
    if "classifier.weight" in tensors:
        return classifier
    if any("predictions." in name for name in tensors):
        return pretraining if any(name.startswith(family.order) for name in tensors) else masked
    return bare

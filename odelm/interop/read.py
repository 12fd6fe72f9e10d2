"""A Hugging Face folder as a model of ours: `config.json` and safetensors in, with nothing left over."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx

from odelm.config import Config, DataConfig, ModelConfig, StepSamplingConfig, TrainConfig
from odelm.data import tokenizer as tokenizers
from odelm.errors import InputError, nearest
from odelm.interop import folder as files
from odelm.interop import tensors as layouts
from odelm.interop.encoders import ALBERT, BERT
from odelm.interop.family import Family, FolderConfig, Model
from odelm.interop.gpt2 import GPT2
from odelm.models import CausalLM, Classifier, Encoder, MaskedLM
from odelm.models.parameters import parameters, with_parameters

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FAMILIES = {family.model_type: family for family in (ALBERT, BERT, GPT2)}
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Folder:
    """What a folder holds."""

    model: Model
    tokenizer: "Tokenizer | None"
    """None where the folder has no tokenizer.json."""
    unused: tuple[str, ...]
    """Tensors of heads that the folder's architecture has no use for."""


def read(path: str | Path, *, options: ModelConfig | None = None) -> Folder:
    """Reads an ALBERT, BERT or GPT-2 folder; parameters become float32.

    The class follows the folder's architecture: `CausalLM`, `MaskedLM`, `Classifier`, or `Encoder` for a bare
    `AlbertModel`. `options` gives the dtypes to compute in. Raises InputError, naming what is wrong, for another
    kind of model, options with no equivalent here, pickled weights, and tensors that do not fit the config.
    """
    path = Path(path)
    config = files.read_config(path)
    family = _family(config, path)
    made = family.model_config(config)
    if options is not None:
        made.dtype, made.residual_dtype = options.dtype, options.residual_dtype
    tensors = _named(family, config, files.read_tensors(path), tied=made.tie_readout)
    model = nnx.eval_shape(lambda: _make(family, config, made.validate(), tensors))
    entries = family.entries(model)
    used = {name for entry in entries for name in entry.tensors}
    unused = tuple(sorted(name for name in tensors if name not in used and family.heads.fullmatch(name)))
    arrays = layouts.read(
        entries,
        {name: leaf.shape for name, leaf in parameters(model).items()},
        {name: tensor for name, tensor in tensors.items() if name not in unused},
        place=str(path),
        implied_by=", ".join(f"{field} {config[field]}" for field in family.sizes if field in config),
    )
    device = jax.local_devices()[0]
    model = with_parameters(model, {name: jax.device_put(array, device) for name, array in arrays.items()})
    file = path / files.TOKENIZER
    return Folder(model, tokenizers.load(file) if file.is_file() else None, unused)


def load(path: str | Path, *, options: ModelConfig | None = None) -> tuple[Model, Config, "Tokenizer | None"]:
    """Returns (model, config, tokenizer) of a folder, as `odelm.load` does of a run. Errors are those of `read`."""
    found = read(path, options=options)
    model, file = found.model.config, Path(path) / files.TOKENIZER
    config = Config(
        model=model,
        data=DataConfig(tokenizer=str(file) if found.tokenizer else ""),
        step_sampling=StepSamplingConfig(counts=()),
        train=TrainConfig(length=min(TrainConfig.length, model.max_length)),
    )
    return found.model, config.validate(), found.tokenizer


def _family(config: FolderConfig, path: Path) -> Family:
    name = config.get("model_type")
    if name not in FAMILIES:
        raise InputError(f"{path} is of model_type {name!r}, which has no equivalent; {nearest(str(name), FAMILIES)}")
    return FAMILIES[name]


def _named(family: Family, config: FolderConfig, tensors: Tensors, *, tied: bool) -> Tensors:
    """Returns the tensors under the names that the entries use: no prefix, nothing twice, nothing without effect."""
    plain = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(family.prefix)
        # The oldest folders call the parts of a norm by the names that TensorFlow had for them.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if not family.ignored.fullmatch(name):
            plain[name] = tensor
    for twin, name in family.duplicates.items():
        if tied and twin in plain:
            copy = plain.pop(twin)
            if not np.array_equal(copy, plain.setdefault(name, copy)):
                raise InputError(f"{twin} differs from {name}, though tie_word_embeddings says that they are one")
        elif not tied and name.endswith(".bias") and name in plain:
            plain.setdefault(twin, plain.pop(name))
    return family.prepared(config, plain)


def _make(family: Family, config: FolderConfig, model: ModelConfig, tensors: Tensors) -> Model:
    """Returns a new model of the class that the folder's architecture, or else its tensors, ask for."""
    made, rngs = _class(family, config, tensors), nnx.Rngs(0)
    if made is CausalLM:
        return CausalLM(model, rngs=rngs)
    if made is Classifier:
        return Classifier(model, outputs=config.get("num_labels", len(config.get("id2label", (0, 1)))), rngs=rngs)
    if made is Encoder:
        return Encoder(model, pooled=any(name.startswith("pooler.") for name in tensors), rngs=rngs)
    model.sentence_order = any(name.startswith(family.order) for name in tensors)
    return MaskedLM(model, rngs=rngs)


def _class(family: Family, config: FolderConfig, tensors: Tensors) -> type:
    names = config.get("architectures") or []
    if names:
        if names[0] not in family.architectures:
            raise InputError(
                f"config.json says architecture {names[0]!r}, which has no equivalent; "
                f"{nearest(names[0], family.architectures)}"
            )
        return family.architectures[names[0]]
    if family is GPT2:
        return CausalLM
    if "classifier.weight" in tensors:
        return Classifier
    return MaskedLM if any("predictions." in name for name in tensors) else Encoder

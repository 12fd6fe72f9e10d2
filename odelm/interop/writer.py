"""A model of ours as a Hugging Face folder that `transformers` loads and that gives the same logits."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.files import publish
from odelm.interop import folder as files
from odelm.interop import tensors as layouts
from odelm.interop.convert import flattened, unrolled
from odelm.interop.encoders import ALBERT, BERT
from odelm.interop.family import Family, FolderConfig, Model
from odelm.interop.gpt2 import GPT2
from odelm.models import CausalLM, Classifier, Encoder, MaskedLM
from odelm.models.embed import sinusoid_table
from odelm.models.parameters import abstract_like, parameters, with_parameters
from odelm.tokenizer import NAMES, check_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = ("[UNK]", "<unk>", "<|unk|>")


def export(model: Model, folder: str | Path, *, tokenizer: "Tokenizer | None" = None, end_token: str = "") -> str:
    """Writes the folder, whole or not at all, and returns one sentence on what it is.

    A post-norm encoder becomes ALBERT, or BERT if it shares nothing and does not project its embeddings; a pre-norm
    decoder becomes GPT-2, its shared block written `depth` times. Everything in a block that depends on time is folded
    into separate layers. Raises InputError listing the options with no equivalent, for a quantised model, and if
    `folder` is there already.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise InputError(f"{folder} exists already; give a new directory")
    if model.quantization is not None:
        raise InputError(f"the model is quantised, as {model.quantization}: export the one that it was made from")
    family, plain = as_family(model)
    if tokenizer is not None:
        check_size(tokenizer, model.config.vocab_size)
    architecture = _architecture(family, plain)
    config = (
        family.folder_config(plain.config) | _named_ids(plain, tokenizer, end_token) | {"architectures": [architecture]}
    )
    if isinstance(plain, Classifier):
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(plain.head.out.out_features)}
        config["label2id"] = {label: int(i) for i, label in config["id2label"].items()}
    tensors = _tensors(family, plain, prefix="" if architecture.endswith("Model") else family.prefix)
    with publish(folder, option="folder") as partial:
        files.write(partial, config, tensors, _tokenizer_files(plain, tokenizer, end_token))
    written = plain.config.groups > model.config.groups
    note = (
        f"; its {model.config.groups} shared blocks are written as {plain.config.groups} layers, for full depth only"
        if written
        else ""
    )
    return f"wrote {folder}: {architecture}, {len(tensors)} tensors{note}"


def as_family(model: Model) -> tuple[Family, Model]:
    """Returns the family that has an equivalent of the model, and the equivalent in the form that it writes."""
    config = model.config
    separate = config.time_modulation or config.layer_rank > 0 or config.ends > 0 or config.reference_depth is not None
    unshared = config.groups == config.depth or separate
    if config.kind == "decoder":
        family = GPT2
    else:
        family = BERT if unshared and config.embed_dim is None else ALBERT
    obstacles = family.obstacles(config)
    if obstacles:
        raise InputError(f"there is no equivalent in {family.model_type.upper()} of model.{', model.'.join(obstacles)}")
    if separate or family is GPT2:
        model = unrolled(model)
    if family is not ALBERT and model.config.inner_blocks > 1:
        model = flattened(model)
    return family, _completed(model, family)


def _tensors(family: Family, model: Model, *, prefix: str) -> dict[str, np.ndarray]:
    """Returns the tensors under the names that transformers gives them, those of the body after `prefix`."""
    tensors = layouts.write(family.entries(model), parameters(model))
    # A pooler belongs to the body.
    heads = (*(head for head in family.heads if head != "pooler."), "lm_head.")
    named = {name if name.startswith(heads) else prefix + name: tensor for name, tensor in tensors.items()}
    if not model.config.tie_readout and isinstance(model, MaskedLM):
        bias = next(name for name in family.duplicates if name.endswith("decoder.bias"))
        named[family.duplicates[bias]] = named[bias]
    return named


def _completed(model: Model, family: Family) -> Model:
    """Returns an equal model with all the parameters that the family has: biases of zero, a table of sinusoids, ..."""
    config = dataclasses.replace(model.config, bias=True, positions="learned")
    if config.kind == "encoder":
        config = dataclasses.replace(config, token_types=max(config.token_types, 1))
    if family is ALBERT:
        config = dataclasses.replace(config, embed_dim=config.embed_size)
    complete = abstract_like(model, config)
    own = parameters(model)
    return with_parameters(
        complete,
        {name: own[name] if name in own else _filled(name, leaf.shape, config) for name, leaf in
         parameters(complete).items()},
    )  # fmt: skip


def _filled(name: str, shape: tuple[int, ...], config: ModelConfig) -> jnp.ndarray:
    if name == "embed/learned":
        return sinusoid_table(*shape)
    if name == "embed/project/kernel":
        return jnp.eye(shape[0])
    assert name.endswith("/bias") or name == "embed/types", name
    return jnp.zeros(shape)


def _architecture(family: Family, model: Model) -> str:
    if isinstance(model, CausalLM):
        return "GPT2LMHeadModel"
    bare, masked, pretraining, classifier = family.architectures
    if isinstance(model, Encoder):
        return bare
    if isinstance(model, Classifier):
        return classifier
    return pretraining if model.config.sentence_order else masked


def _special(model: Model, tokenizer: "Tokenizer | None", end_token: str) -> dict[str, str]:
    """Returns the special tokens by the names that transformers has for them, as far as the tokenizer has them.

    A text begins and ends with the class and separator token in an encoder, with the end-of-text token in a decoder.
    """
    if tokenizer is None:
        return {}
    begin, end = ("end", "end") if isinstance(model, CausalLM) else ("cls", "sep")
    roles = {"pad": "pad", "bos": begin, "eos": end, "cls": "cls", "sep": "sep", "mask": "mask"}
    own = {"end": (end_token,)} if end_token else {}
    names = {name: (NAMES | own)[role] for name, role in roles.items()} | {"unk": UNKNOWN}
    held = {
        name: [token for token in tokens if tokenizer.token_to_id(token) is not None] for name, tokens in names.items()
    }
    return {name: tokens[0] for name, tokens in held.items() if tokens}


def _named_ids(model: Model, tokenizer: "Tokenizer | None", end_token: str) -> FolderConfig:
    """Returns the ids of the special tokens, which transformers would otherwise take from its defaults."""
    tokens = _special(model, tokenizer, end_token)
    return {
        f"{name}_token_id": tokenizer.token_to_id(tokens[name]) if tokenizer and name in tokens else None
        for name in ("pad", "bos", "eos")
    }


def _tokenizer_files(model: Model, tokenizer: "Tokenizer | None", end_token: str) -> dict[str, str]:
    """Returns tokenizer.json, with an encoder's special tokens put around its texts, and the settings that name
    them."""
    if tokenizer is None:
        return {}
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer, tokens = Tokenizer.from_str(tokenizer.to_str()), _special(model, tokenizer, end_token)
    typed = not isinstance(model, CausalLM) and model.config.token_types > 1
    if not isinstance(model, CausalLM) and tokenizer.post_processor is None and {"cls", "sep"} <= set(tokens):
        cls, sep, second = tokens["cls"], tokens["sep"], int(typed)
        tokenizer.post_processor = TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:{second} {sep}:{second}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_length,
        "model_input_names": ["input_ids", *(["token_type_ids"] if typed else []), "attention_mask"],
        **{f"{name}_token": token for name, token in tokens.items()},
    }
    return {files.TOKENIZER: tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}

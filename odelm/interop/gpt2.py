"""GPT-2 (Radford et al. 2019), with the variants of its attention's scale that its config can ask for."""

import math
import re

import numpy as np

from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.interop.family import (
    WRITTEN_ACTIVATIONS,
    Family,
    FolderConfig,
    Model,
    activation,
    common_obstacles,
    flag,
    number,
    refuse,
    share,
)
from odelm.interop.tensors import JOINED, JOINED_BIAS, MERGED, Entry, norm
from odelm.models import CausalLM

ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
"""Other names that transformers takes for the same fields."""


def _plain(config: FolderConfig) -> FolderConfig:
    """Returns the config under GPT-2's own names; InputError if two names of a field differ."""
    plain = dict(config)
    for alias, name in ALIASES.items():
        if alias in plain and plain.setdefault(name, plain[alias]) != plain[alias]:
            raise InputError(
                f"config.json says {alias} {plain[alias]!r} and {name} {plain[name]!r}, which are one field"
            )
    return plain


def _model_config(config: FolderConfig) -> ModelConfig:
    refuse(config, {"add_cross_attention": False})
    config = _plain(config)
    depth = number(config, "n_layer", 12)
    return ModelConfig(
        kind="decoder",
        vocab_size=number(config, "vocab_size", 50_257),
        width=number(config, "n_embd", 768),
        heads=number(config, "n_head", 12),
        depth=depth,
        groups=depth,
        feedforward=None if config.get("n_inner") is None else number(config, "n_inner", 0),
        max_length=number(config, "n_positions", 1024),
        norm="layernorm",
        norm_placement="pre",
        norm_eps=share(config, "layer_norm_epsilon", 1e-5),
        activation=activation(config, "activation_function", "gelu_new"),
        positions="learned",
        qk_norm=False,
        bias=True,
        tie_readout=flag(config, "tie_word_embeddings", True),
        time_modulation=False,
        dropout=share(config, "resid_pdrop", 0.1),
    )


def _folder_config(model: ModelConfig) -> FolderConfig:
    return {
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_embd": model.width,
        "n_head": model.heads,
        "n_layer": model.depth,
        "n_inner": model.feedforward_size,
        "n_positions": model.max_length,
        "activation_function": WRITTEN_ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": model.tie_readout,
    }


def _obstacles(model: ModelConfig) -> list[str]:
    found = common_obstacles(model)
    if model.norm_placement != "pre":
        found.append("norm_placement=post (GPT-2 is pre-norm)")
    if model.embed_norm:
        found.append("embed_norm=True (GPT-2 does not normalise its embeddings)")
    if model.embed_dim is not None:
        found.append(f"embed_dim={model.embed_dim} (GPT-2 does not project its embeddings)")
    if model.token_types:
        found.append(f"token_types={model.token_types} (GPT-2 has no embeddings of types)")
    return found


def _entries(model: Model) -> list[Entry]:
    entries = [Entry("embed/tokens", ("wte.weight",)), Entry("embed/learned", ("wpe.weight",))]
    for g in range(model.config.groups):
        ours, theirs = f"blocks/{g}", f"h.{g}"
        entries += [
            *norm(f"{ours}/norm1", f"{theirs}.ln_1"),
            Entry(f"{ours}/attention/qkv/kernel", (f"{theirs}.attn.c_attn.weight",), JOINED),
            Entry(f"{ours}/attention/qkv/bias", (f"{theirs}.attn.c_attn.bias",), JOINED_BIAS),
            Entry(f"{ours}/attention/out/kernel", (f"{theirs}.attn.c_proj.weight",), MERGED),
            Entry(f"{ours}/attention/out/bias", (f"{theirs}.attn.c_proj.bias",)),
            *norm(f"{ours}/norm2", f"{theirs}.ln_2"),
        ]
        for part, name in (("up", "c_fc"), ("down", "c_proj")):
            entries.append(Entry(f"{ours}/feedforward/{part}/kernel", (f"{theirs}.mlp.{name}.weight",)))
            entries.append(Entry(f"{ours}/feedforward/{part}/bias", (f"{theirs}.mlp.{name}.bias",)))
    entries += norm("final_norm", "ln_f")
    if not model.config.tie_readout:
        entries.append(Entry("head/tokens", ("lm_head.weight",)))
    return entries


def _scaled(config: FolderConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Moves the scale of a layer's attention logits, where it is not `1/sqrt(K)`, into its queries."""
    model = _model_config(config)
    by_layer = flag(config, "scale_attn_by_inverse_layer_idx", False)
    unscaled = 1.0 if flag(config, "scale_attn_weights", True) else math.sqrt(model.head_size)
    scaled = dict(tensors)
    for g in range(model.depth):
        factor = unscaled / (g + 1 if by_layer else 1)
        for part in ("weight", "bias"):
            name = f"h.{g}.attn.c_attn.{part}"
            if factor != 1.0 and name in scaled:
                factors = np.where(np.arange(scaled[name].shape[-1]) < model.width, factor, 1.0)
                scaled[name] = (scaled[name] * factors).astype(np.float32)
    return scaled


GPT2 = Family(
    model_type="gpt2",
    prefix="transformer.",
    architectures={"GPT2Model": CausalLM, "GPT2LMHeadModel": CausalLM},
    model_config=_model_config,
    folder_config=_folder_config,
    obstacles=_obstacles,
    entries=_entries,
    order="",
    sizes=("vocab_size", "n_embd", "n_inner", "n_layer", "n_positions"),
    ignored=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
    duplicates={"lm_head.weight": "wte.weight"},
    heads=(),
    prepared=_scaled,
)

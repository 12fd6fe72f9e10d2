"""ALBERT (Lan et al. 2019, arXiv 1909.11942) and BERT (Devlin et al. 2018, arXiv 1810.04805)."""

import dataclasses
import re
from functools import partial

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
from odelm.interop.tensors import Entry, attention, linear, norm
from odelm.models import Classifier, Encoder, MaskedLM

# What ALBERT's and BERT's arithmetic have in common.
POST_NORM = ModelConfig(
    kind="encoder",
    norm="layernorm",
    norm_placement="post",
    embed_norm=True,
    positions="learned",
    qk_norm=False,
    bias=True,
    time_modulation=False,
)


def _common(config: FolderConfig, vocab_size: int, width: int, heads: int, feedforward: int) -> ModelConfig:
    """Returns what ALBERT's and BERT's configs have in common, given the defaults that transformers has for each."""
    refuse(config, {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False})
    return dataclasses.replace(
        POST_NORM,
        vocab_size=number(config, "vocab_size", vocab_size),
        width=number(config, "hidden_size", width),
        heads=number(config, "num_attention_heads", heads),
        feedforward=number(config, "intermediate_size", feedforward),
        depth=number(config, "num_hidden_layers", 12),
        max_length=number(config, "max_position_embeddings", 512),
        token_types=number(config, "type_vocab_size", 2),
        norm_eps=share(config, "layer_norm_eps", 1e-12),
        tie_readout=flag(config, "tie_word_embeddings", True),
    )


def _albert_config(config: FolderConfig) -> ModelConfig:
    common, groups = _common(config, 30_000, 4096, 64, 16_384), number(config, "num_hidden_groups", 1)
    if common.depth % groups:
        raise InputError(
            f"num_hidden_groups is {groups}, which does not divide num_hidden_layers ({common.depth}): here every "
            "group covers as much of the depth as any other"
        )
    return dataclasses.replace(
        common,
        groups=groups,
        inner_blocks=number(config, "inner_group_num", 1),
        embed_dim=number(config, "embedding_size", 128),
        activation=activation(config, "hidden_act", "gelu_new"),
        dropout=share(config, "hidden_dropout_prob", 0.0),
    )


def _bert_config(config: FolderConfig) -> ModelConfig:
    common = _common(config, 30_522, 768, 12, 3072)
    return dataclasses.replace(
        common,
        groups=common.depth,
        activation=activation(config, "hidden_act", "gelu"),
        dropout=share(config, "hidden_dropout_prob", 0.1),
    )


def _folder_config(model: ModelConfig, family: str) -> FolderConfig:
    config = {
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.depth,
        "intermediate_size": model.feedforward_size,
        "hidden_act": WRITTEN_ACTIVATIONS[model.activation],
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": model.max_length,
        "type_vocab_size": model.token_types,
        "layer_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_readout,
    }
    if family == "albert":
        config |= {
            "embedding_size": model.embed_size,
            "num_hidden_groups": model.groups,
            "inner_group_num": model.inner_blocks,
        }
    return config


def _obstacles(model: ModelConfig) -> list[str]:
    found = common_obstacles(model)
    if model.norm_placement != "post":
        found.append("norm_placement=pre (BERT and ALBERT are post-norm)")
    if not model.embed_norm:
        found.append("embed_norm=False (BERT and ALBERT normalise their embeddings)")
    return found


def _body(projected: bool) -> list[Entry]:
    embeddings = [
        Entry("embed/tokens", ("embeddings.word_embeddings.weight",)),
        Entry("embed/learned", ("embeddings.position_embeddings.weight",)),
        Entry("embed/types", ("embeddings.token_type_embeddings.weight",)),
        *norm("embed/norm", "embeddings.LayerNorm"),
    ]
    return embeddings + (linear("embed/project", "encoder.embedding_hidden_mapping_in") if projected else [])


def _heads(
    model: Model, *, transform: str, transform_norm: str, decoder: str, bias: str, pooler: str, order: str
) -> list[Entry]:
    """Returns the entries of the heads, given what the family calls them."""
    if isinstance(model, Encoder):
        return linear("pool", pooler) if model.pool is not None else []
    if isinstance(model, Classifier):
        return linear("head/pool", pooler) + linear("head/out", "classifier")
    tied = model.config.tie_readout
    entries = [*linear("head/project", transform), *norm("head/norm", transform_norm)]
    # An untied readout has a bias of its own in torch, and the one beside it is not used.
    entries.append(Entry("head/bias", (bias,) if tied else (f"{decoder}.bias",)))
    if not tied:
        entries.append(Entry("head/tokens", (f"{decoder}.weight",)))
    if isinstance(model, MaskedLM) and model.order is not None:
        entries += linear("order/pool", pooler) + linear("order/out", order)
    return entries


def _albert_entries(model: Model) -> list[Entry]:
    entries, inner = _body(projected=True), model.config.inner_blocks
    for g in range(model.config.groups):
        for i in range(inner):
            ours = f"blocks/{g}" if inner == 1 else f"blocks/{g}/inner/{i}"
            theirs = f"encoder.albert_layer_groups.{g}.albert_layers.{i}"
            parts = [f"{theirs}.attention.{part}" for part in ("query", "key", "value", "dense")]
            entries += attention(f"{ours}/attention", parts[:3], parts[3])
            entries += norm(f"{ours}/norm1", f"{theirs}.attention.LayerNorm")
            entries += linear(f"{ours}/feedforward/up", f"{theirs}.ffn")
            entries += linear(f"{ours}/feedforward/down", f"{theirs}.ffn_output")
            entries += norm(f"{ours}/norm2", f"{theirs}.full_layer_layer_norm")
    return entries + _heads(
        model,
        transform="predictions.dense",
        transform_norm="predictions.LayerNorm",
        decoder="predictions.decoder",
        bias="predictions.bias",
        pooler="pooler",
        order="sop_classifier.classifier",
    )


def _bert_entries(model: Model) -> list[Entry]:
    entries = _body(projected=False)
    for g in range(model.config.groups):
        ours, theirs = f"blocks/{g}", f"encoder.layer.{g}"
        inputs = [f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")]
        entries += attention(f"{ours}/attention", inputs, f"{theirs}.attention.output.dense")
        entries += norm(f"{ours}/norm1", f"{theirs}.attention.output.LayerNorm")
        entries += linear(f"{ours}/feedforward/up", f"{theirs}.intermediate.dense")
        entries += linear(f"{ours}/feedforward/down", f"{theirs}.output.dense")
        entries += norm(f"{ours}/norm2", f"{theirs}.output.LayerNorm")
    return entries + _heads(
        model,
        transform="cls.predictions.transform.dense",
        transform_norm="cls.predictions.transform.LayerNorm",
        decoder="cls.predictions.decoder",
        bias="cls.predictions.bias",
        pooler="pooler.dense",
        order="cls.seq_relationship",
    )


ALBERT = Family(
    model_type="albert",
    prefix="albert.",
    architectures={
        "AlbertModel": Encoder,
        "AlbertForMaskedLM": MaskedLM,
        "AlbertForPreTraining": MaskedLM,
        "AlbertForSequenceClassification": Classifier,
    },
    model_config=_albert_config,
    folder_config=partial(_folder_config, family="albert"),
    obstacles=_obstacles,
    entries=_albert_entries,
    order="sop_classifier.",
    sizes=(
        "vocab_size", "embedding_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_hidden_groups",
        "inner_group_num", "max_position_embeddings", "type_vocab_size",
    ),
    ignored=re.compile(r"embeddings\.(position_ids|token_type_ids)"),
    duplicates={
        "predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    heads=("pooler.", "predictions.", "sop_classifier.", "classifier."),
)  # fmt: skip

BERT = Family(
    model_type="bert",
    prefix="bert.",
    architectures={
        "BertModel": Encoder,
        "BertForMaskedLM": MaskedLM,
        "BertForPreTraining": MaskedLM,
        "BertForSequenceClassification": Classifier,
    },
    model_config=_bert_config,
    folder_config=partial(_folder_config, family="bert"),
    obstacles=_obstacles,
    entries=_bert_entries,
    order="cls.seq_relationship.",
    sizes=(
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings",
        "type_vocab_size",
    ),
    ignored=re.compile(r"embeddings\.position_ids"),
    duplicates={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    heads=("pooler.", "cls.predictions.", "cls.seq_relationship.", "classifier."),
)  # fmt: skip

"""Every option: typed, with its unit and reason; validated; written to JSON; fingerprinted.

A recipe under `configs/` is a `get_config()` that returns a `Config`. The dataclasses are mutable because
command-line overrides (`--config.train.updates=100`) are applied to them; `Config.validate` is called once
they are, and raises `odelm.errors.InputError` naming the field, its value and the nearest valid choice.
"""

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from odelm.errors import InputError, nearest
from odelm.ode.integrate import REMAT_POLICIES
from odelm.validation import check_types, choice, divides, nearest_divisor, positive, within

KINDS = ("decoder", "encoder")
NORMS = ("layernorm", "rmsnorm")
NORM_PLACEMENTS = ("pre", "post")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu", "relu2", "relu", "silu")
POSITIONS = ("learned", "sinusoidal", "rotary")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SAMPLINGS = ("fixed", "random_sizes", "random_count")
CORPORA = ("python_source", "text", "openwebtext", "pile")
ON_BAD_RECORD = ("error", "skip")
MASK_UNITS = ("token", "word", "span")
PACKINGS = ("auto", "concatenate", "segments", "documents")
DECAYS = ("cosine", "linear", "constant")
MERGES = ("mean", "layer", "low_rank")
ADOPTED = ("time_modulation", "dropout", "dtype", "residual_dtype")
"""The options of `model` that count where the model is that of `init.from_pretrained`."""

T = TypeVar("T")


@dataclass(unsafe_hash=True)
class ModelConfig:
    """The shape and arithmetic of a model. The defaults are a modern pre-norm block; GPT-2 and ALBERT are
    exact settings of the same fields (see `configs/decoder_small.py` and `configs/encoder_base.py`)."""

    kind: str = "decoder"
    """`decoder` (causal, next token) or `encoder` (bidirectional, masked tokens)."""
    vocab_size: int = 2048
    width: int = 128
    """Size D of the state that is integrated."""
    heads: int = 4
    depth: int = 12
    """Length of the depth-time interval: the number of unit steps that is full depth."""
    groups: int = 1
    """How many different blocks: 1 shares everything, `depth` shares nothing."""
    inner_blocks: int = 1
    """How many blocks, one after the other, make up what a group applies at each unit of depth (ALBERT's
    `inner_group_num`)."""
    layer_rank: int = 0
    """Rank of the residual that each unit of depth keeps of its own beside the shared matrices; 0 is none
    (see `odelm.models.residual`)."""
    feedforward: int | None = None
    """Size F of the feed-forward layer; None is 4 * width."""
    embed_dim: int | None = None
    """Size E of the factorised embedding, projected to the width; None is width, with no projection."""
    max_length: int = 1024
    """The longest sequence, in tokens."""
    norm: str = "rmsnorm"
    norm_placement: str = "pre"
    norm_eps: float = 1e-6
    embed_norm: bool = False
    """Normalise the embeddings before they enter the state (BERT and ALBERT do)."""
    activation: str = "gelu_tanh"
    positions: str = "rotary"
    rotary_base: float = 10_000.0
    qk_norm: bool = True
    """Normalise queries and keys per head, so that attention logits stay bounded over repeated use."""
    bias: bool = False
    tie_readout: bool = True
    time_modulation: bool = True
    """Let the block know its depth time (see `odelm.models.modulation`)."""
    parallel_branches: bool = False
    """Attention and MLP read the same state, instead of one after the other."""
    token_types: int = 0
    """Number of token-type (segment) embeddings; 0 is none."""
    sentence_order: bool = False
    """Encoder only: a head that tells whether two segments are in order (ALBERT's second objective)."""
    dropout: float = 0.0
    """Rate on the embeddings and on both branches' outputs, applied only where a key is given."""
    dtype: str = "auto"
    """Of matrix products; `auto` is bfloat16 on GPU and TPU, float32 on CPU. Parameters are float32."""
    residual_dtype: str = "auto"
    """Of the integrated state; `auto` is the same as `dtype`."""

    @property
    def feedforward_size(self) -> int:
        return self.feedforward or 4 * self.width

    @property
    def embed_size(self) -> int:
        return self.embed_dim or self.width

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    def validate(self) -> "ModelConfig":
        """Returns self, or raises InputError naming the first field that cannot be."""
        check_types(self, "model")
        choice("model.kind", self.kind, KINDS)
        choice("model.norm", self.norm, NORMS)
        choice("model.norm_placement", self.norm_placement, NORM_PLACEMENTS)
        choice("model.activation", self.activation, ACTIVATIONS)
        choice("model.positions", self.positions, POSITIONS)
        choice("model.dtype", self.dtype, DTYPES)
        choice("model.residual_dtype", self.residual_dtype, DTYPES)
        for name in ("vocab_size", "width", "heads", "depth", "groups", "inner_blocks", "max_length"):
            positive(f"model.{name}", getattr(self, name))
        for name in ("feedforward", "embed_dim"):
            if getattr(self, name) is not None:
                positive(f"model.{name}", getattr(self, name))
        divides("model.heads", self.heads, "model.width", self.width)
        divides("model.groups", self.groups, "model.depth", self.depth)
        within("model.dropout", self.dropout, 0.0, 1.0)
        if self.norm_eps <= 0:
            raise InputError(f"model.norm_eps is {self.norm_eps}, expected a positive number such as 1e-6")
        for name in ("token_types", "layer_rank"):
            if getattr(self, name) < 0:
                raise InputError(f"model.{name} is {getattr(self, name)}, expected 0 or more")
        if self.positions == "rotary" and self.head_size % 2:
            raise InputError(
                f"model.width / model.heads is {self.head_size}, but rotary positions turn pairs: expected an "
                f"even head size; try model.heads={nearest_divisor(self.width // 2, self.heads)}"
            )
        if self.positions == "sinusoidal" and self.embed_size % 2:
            raise InputError(f"sinusoidal positions come in pairs, but the embedding size is {self.embed_size} (odd)")
        if self.sentence_order and self.kind != "encoder":
            raise InputError("model.sentence_order is True, but only model.kind='encoder' has that head")
        return self


@dataclass(unsafe_hash=True)
class DataConfig:
    corpus: str = "python_source"
    """`python_source` (the standard library of the running interpreter), `text` (your own files), `openwebtext`,
    `pile`, or `tfds:NAME` for one of the TFDS catalogue."""
    source: str = ""
    """A file, folder or glob. For `text`: .txt and .jsonl, each plain, .gz, .xz or .zst. For `openwebtext`: its
    archive, unpacked or not, or .jsonl. For `pile`: its .jsonl.zst shards. For `tfds:NAME`: the folder of TFDS."""
    components: tuple[str, ...] = ()
    """The parts of the corpus to use, by name: for `pile` its sets, for `text` the names of the .jsonl files and of
    the folders of .txt files. Empty is all."""
    exclude: tuple[str, ...] = ()
    """Parts of the corpus to leave out; nothing of them is kept on disk."""
    weights: tuple[float, ...] = ()
    """The share of each of `components` in training, to a hundredth of the smallest, so that each crosses its epochs at
    its own rate. Empty takes every window once an epoch. Evaluation takes each held-out window once in either case."""
    on_bad_record: str = "error"
    """What to do with a record that cannot be read: `error` names it and stops, `skip` leaves it out and counts."""
    text_feature: str = "text"
    """For `tfds:NAME`: the feature that holds the text."""
    data_dir: str = "~/.cache/odelm"
    """Where prepared corpora, tokenizers and tokens are kept and found again."""
    tokenizer: str = ""
    """Path of a `tokenizer.json` to use; empty trains a byte-level BPE on the corpus."""
    vocab_size: int | None = None
    """Vocabulary of a trained tokenizer; None is model.vocab_size."""
    valid_fraction: float = 0.02
    """Share of documents held out, chosen by a stable hash of each document."""
    tokenizer_bytes: int = 20_000_000
    """How much text, in bytes, the tokenizer is trained on."""
    packing: str = "auto"
    """What a row holds. `concatenate`: a window of all documents in a row, which see each other. `segments`: the same
    windows, but a token sees its own document alone, and positions start anew in each. `documents`: tokens of one
    document, the row padded where it ends. `auto`: `documents` for a model with sentence order, else `concatenate`."""
    mask_rate: float = 0.15
    """Encoder only: the share of tokens to predict."""
    mask_unit: str = "token"
    """Encoder only: what is masked as one: a `token`, a whole `word`, or a `span` of one to three words (ALBERT's)."""
    workers: int = 0
    """Processes that make batches, beside the one that trains; 0 makes them in its threads."""

    def validate(self) -> "DataConfig":
        check_types(self, "data")
        if not self.corpus.startswith("tfds:"):
            choice("data.corpus", self.corpus, CORPORA)
            if self.corpus != "python_source" and not self.source:
                raise InputError(
                    f"data.corpus is {self.corpus!r}, but data.source is empty: give a file, a folder or a glob"
                )
        choice("data.on_bad_record", self.on_bad_record, ON_BAD_RECORD)
        choice("data.packing", self.packing, PACKINGS)
        choice("data.mask_unit", self.mask_unit, MASK_UNITS)
        self._validate_components()
        if not 0.0 < self.valid_fraction < 1.0:
            raise InputError(f"data.valid_fraction is {self.valid_fraction}, expected a number between 0 and 1")
        if not 0.0 < self.mask_rate < 1.0:
            raise InputError(f"data.mask_rate is {self.mask_rate}, expected a number between 0 and 1, such as 0.15")
        if self.vocab_size is not None:
            positive("data.vocab_size", self.vocab_size)
        positive("data.tokenizer_bytes", self.tokenizer_bytes)
        if self.workers < 0:
            raise InputError(f"data.workers is {self.workers}, expected 0 or more")
        return self

    def _validate_components(self) -> None:
        named = self.components + self.exclude
        if named and self.corpus not in ("text", "pile"):
            raise InputError(f"data.components and data.exclude choose among parts, which {self.corpus!r} has not")
        if len(set(named)) < len(named):
            raise InputError(f"data.components and data.exclude name a part twice: {', '.join(named)}")
        if self.weights and len(self.weights) != len(self.components):
            raise InputError(
                f"data.weights has {len(self.weights)} entries, expected one for each of the {len(self.components)} "
                "data.components, or none"
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise InputError(f"data.weights is {self.weights}, expected positive numbers")


@dataclass(unsafe_hash=True)
class StepSamplingConfig:
    """How pre-training draws its depth steps, once an update (see `odelm.ode.grid`)."""

    kind: str = "random_count"
    """`fixed`: unit steps. `random_sizes`: sizes i.i.d. U(low, high), scaled to span the depth.
    `random_count`: a count drawn from `counts`, equal steps."""
    counts: tuple[int, ...] = (3, 4, 6, 12)
    """Numbers of steps to draw from; each must divide evenly over the groups. Empty is full depth, a half, a third
    and a quarter of it; with `anneal`, counts from full depth to a quarter of it, each about a fifth below the last."""
    weights: tuple[float, ...] = ()
    """Relative probability of each count; empty is uniform."""
    low: float = 0.5
    """Of `random_sizes`: the smallest size before scaling."""
    high: float = 1.5
    jitter: float = 0.0
    """Of `random_count`: relative half-width of a uniform perturbation of the step sizes, 0 to below 1."""
    anneal: float = 0.0
    """Share of the updates over which the counts are let in one by one, the largest first; 0 draws from all at once.
    A model trained with unit steps may lose all that it learned if it meets steps of four at once. A run resumed with
    more updates lets them in by the new number."""

    def validate(self, model: ModelConfig) -> "StepSamplingConfig":
        check_types(self, "step_sampling")
        choice("step_sampling.kind", self.kind, SAMPLINGS)
        if self.kind != "fixed":
            for count in self.counts:
                positive("step_sampling.counts", count)
                divides("model.groups", model.groups, "a count in step_sampling.counts", count)
            counts = self.counts_of(model)
            if counts == (model.depth,) and not self.counts:
                raise InputError(
                    f"step_sampling.kind is {self.kind!r}, but {model.groups} groups and depth {model.depth} leave no "
                    "other count of steps: share the layers among fewer blocks (model.groups, or init.groups of an "
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
        return self

    def counts_of(self, model: ModelConfig) -> tuple[int, ...]:
        """Returns the step counts that random sampling draws from."""
        return self.counts or (annealed_steps(model) if self.anneal else default_steps(model))


@dataclass(unsafe_hash=True)
class OptimizerConfig:
    """AdamW with linear warm-up, a decay, and clipping by global norm."""

    learning_rate: float = 3e-3
    """The peak."""
    warmup: int = 100
    """Updates over which the rate rises from zero."""
    decay: str = "cosine"
    final_fraction: float = 0.1
    """The rate after the last update, as a share of the peak."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices, not to vectors (norm scales, biases)."""
    clip_norm: float = 1.0

    def validate(self) -> "OptimizerConfig":
        check_types(self, "optimizer")
        choice("optimizer.decay", self.decay, DECAYS)
        for name in ("learning_rate", "clip_norm", "eps"):
            if getattr(self, name) <= 0:
                raise InputError(f"optimizer.{name} is {getattr(self, name)}, expected a positive number")
        for name in ("b1", "b2", "final_fraction"):
            within(f"optimizer.{name}", getattr(self, name), 0.0, 1.0)
        if self.weight_decay < 0 or self.warmup < 0:
            raise InputError("optimizer.weight_decay and optimizer.warmup must be 0 or more")
        return self


@dataclass(unsafe_hash=True)
class TrainConfig:
    updates: int = 600
    batch_size: int = 16
    """Sequences an update, over all devices and processes together."""
    length: int = 128
    """Tokens a sequence."""
    eval_every: int = 200
    """Updates between evaluations; there is always one after the last update."""
    eval_batches: int = 16
    """Held-out batches an evaluation; 0 is the whole held-out split."""
    eval_steps: tuple[int, ...] = ()
    """Step counts to evaluate at; empty is full depth, half and a quarter of it."""
    checkpoint_every: int = 200
    keep: int = 2
    """How many checkpoints stay on disk."""
    log_every: int = 10
    seed: int = 0
    unroll: bool = True
    """Unroll the depth loop: faster updates on every backend, longer compilation."""
    remat: str | None = None
    """One of `odelm.ode.integrate.REMAT_POLICIES`, for the depth step, to save memory; None keeps everything."""

    def validate(self, model: ModelConfig) -> "TrainConfig":
        check_types(self, "train")
        for name in ("updates", "batch_size", "length", "eval_every", "checkpoint_every", "keep", "log_every"):
            positive(f"train.{name}", getattr(self, name))
        if self.remat is not None:
            choice("train.remat", self.remat, REMAT_POLICIES)
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


@dataclass(unsafe_hash=True)
class MeshConfig:
    data: int = -1
    """Devices along the batch; -1 is all there are."""

    def validate(self) -> "MeshConfig":
        check_types(self, "mesh")
        if self.data != -1:
            positive("mesh.data", self.data)
        return self


@dataclass(unsafe_hash=True)
class InitConfig:
    """An existing model as the starting point, in place of new parameters, and how its blocks are shared."""

    from_pretrained: str = ""
    """A Hugging Face folder (ALBERT, BERT, GPT-2) or a run directory; empty starts from new parameters. The model is
    then that one's: of `model` only the options of `ADOPTED` count."""
    groups: int | None = None
    """How many blocks to share its layers among; None keeps its own."""
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
        if self.groups is None and self.merge != "mean":
            raise InputError(
                f"init.merge is {self.merge!r}, but init.groups is None: say how many blocks to share among"
            )
        if self.groups is not None and not self.from_pretrained:
            raise InputError("init.groups shares the layers of init.from_pretrained, which is empty: give a folder")
        return self


@dataclass(unsafe_hash=True)
class Config:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    step_sampling: StepSamplingConfig = field(default_factory=StepSamplingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init: InitConfig = field(default_factory=InitConfig)

    def validate(self) -> "Config":
        """Returns self, or raises InputError naming the first field that cannot be."""
        check_types(self, "config")
        self.model.validate()
        self.data.validate()
        self.step_sampling.validate(self.model)
        self.optimizer.validate()
        self.train.validate(self.model)
        self.mesh.validate()
        self.init.validate()
        if self.model.sentence_order and self.packing != "documents":
            raise InputError(
                f"data.packing is {self.data.packing!r}, but a pair of segments with an order (model.sentence_order) "
                "is of one document: expected 'documents' or 'auto'"
            )
        if self.data.vocab_size is not None and self.data.vocab_size > self.model.vocab_size:
            raise InputError(
                f"data.vocab_size is {self.data.vocab_size}, more than model.vocab_size {self.model.vocab_size}"
            )
        return self

    @property
    def packing(self) -> str:
        """What a row of data holds, `auto` decided."""
        if self.data.packing != "auto":
            return self.data.packing
        return "documents" if self.model.sentence_order else "concatenate"

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The step counts that random sampling draws from, one for each weight."""
        return self.step_sampling.counts_of(self.model)

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """The step counts to evaluate at, full depth first."""
        if self.train.eval_steps:
            return tuple(sorted(set(self.train.eval_steps) | {self.model.depth}, reverse=True))
        return default_steps(self.model)


def default_steps(model: ModelConfig) -> tuple[int, ...]:
    """Full depth, half, a third and a quarter of it, as far as they divide over the groups."""
    counts = {model.depth // part for part in (1, 2, 3, 4) if model.depth % part == 0}
    return tuple(sorted((n for n in counts if n % model.groups == 0), reverse=True))


def annealed_steps(model: ModelConfig) -> tuple[int, ...]:
    """Full depth and counts down to a quarter of it, each about a fifth below the last, as the groups allow."""
    groups, counts = model.groups, [model.depth]
    last = max(groups, -(-model.depth // (4 * groups)) * groups)
    while counts[-1] > last:
        counts.append(max(last, int(0.8 * counts[-1]) // groups * groups))
    return tuple(counts)


def to_json(config: Any) -> str:
    """Returns the config (whole, or one part) as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(cls: type[T], values: dict[str, Any], path: str = "config") -> T:
    """Builds a config dataclass from plain values; an unknown key or a wrong type raises InputError."""
    if not isinstance(values, dict):
        raise InputError(f"{path} is {values!r} ({type(values).__name__}), expected an object of options")
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        name = sorted(unknown)[0]
        raise InputError(f"{path}.{name} is not an option; {nearest(name, hints)}")
    parts = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(typing.cast(type, hint), value, f"{path}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        parts[name] = value
    return cls(**parts)


def from_json(text: str) -> Config:
    """Reads what `to_json` wrote and validates it; raises InputError on anything else."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"the config is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"the config is a JSON {type(values).__name__}, expected an object")
    return from_dict(Config, values).validate()


def fingerprint(*parts: Any) -> str:
    """Returns 16 hex digits that are equal exactly when the parts (configs, strings, numbers) are."""
    plain = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]  # pyright: ignore
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

"""The shape and arithmetic of a model."""

from dataclasses import dataclass

from odelm.config.checks import check_types, choice, divides, nearest_divisor, positive, within
from odelm.config.describe import described
from odelm.errors import InputError

KINDS = ("decoder", "encoder")
NORMS = ("layernorm", "rmsnorm")
NORM_PLACEMENTS = ("pre", "post")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu", "relu2", "relu", "silu")
POSITIONS = ("learned", "sinusoidal", "rotary")
ATTENTIONS = ("auto", "xla", "cudnn", "splash")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@described
@dataclass(frozen=True)
class ModelConfig:
    """The shape and arithmetic of a model. The defaults are a modern pre-norm block; GPT-2 and ALBERT are
    exact settings of the same fields (see `configs/decoder_small.py` and `configs/encoder_base.py`)."""

    kind: str = "decoder"
    """`decoder` (causal, next token) or `encoder` (bidirectional, masked tokens)."""
    vocab_size: int = 2048
    """Tokens of the embedding and the readout: as many as the tokenizer has, or more."""
    width: int = 128
    """Size D of the state that is integrated."""
    heads: int = 4
    """Of attention; they share the width evenly."""
    kv_heads: int | None = None
    """Heads of keys and values, each shared by as many heads of queries: a divisor of `heads`, None is `heads`. Fewer
    make a decoder's memory smaller (grouped-query attention; docs/inference.md)."""
    kv_span: int = 1
    """Units of depth over which evaluations share keys and values, those of the first of them: 1 is each its own. More
    make a decoder's memory smaller, at full depth by as much (see `odelm.models.kv_sharing`); only with the `euler`
    solver."""
    depth: int = 12
    """Number of layers that is full depth: prelude, core and coda together. Steps, grids and counts of steps speak of
    the core, `core = depth - prelude - coda`, whose length in time it is."""
    prelude: int = 0
    """Blocks of their own before the shared core, a layer each; counted by `depth`."""
    coda: int = 0
    """Blocks of their own after the shared core, a layer each; counted by `depth`."""
    groups: int = 1
    """How many different blocks the core has: 1 shares all of it, `core` nothing."""
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
    """`layernorm` or `rmsnorm`."""
    norm_placement: str = "pre"
    """`pre`: each branch reads a normalised state, and adds to the state itself (GPT-2). `post`: the state is
    normalised after each addition (BERT, ALBERT), and takes large steps with the `euler` solver only."""
    norm_eps: float = 1e-6
    """Added to a variance or mean square before its root is taken."""
    embed_norm: bool = False
    """Normalise the embeddings before they enter the state (BERT and ALBERT do)."""
    activation: str = "gelu_tanh"
    """Of the feed-forward layer: `gelu`, `gelu_tanh` (GPT-2's approximation), `swiglu`, `relu2`, `relu` or `silu`."""
    positions: str = "rotary"
    """How a token knows its place: `learned` or `sinusoidal` embeddings, or `rotary` queries and keys."""
    rotary_base: float = 10_000.0
    """Of `rotary`: its slowest pair of coordinates turns by about 1 / rotary_base a token."""
    qk_norm: bool = True
    """Normalise queries and keys per head, so that attention logits stay bounded over repeated use."""
    bias: bool = False
    """Whether linear maps have a bias, and LayerNorm a shift."""
    tie_readout: bool = True
    """The readout is the transposed embedding, in place of a matrix of its own."""
    time_modulation: bool = True
    """Let the block know its depth time (see `odelm.models.modulation`)."""
    wide_modulation: bool = False
    """Time also scales queries, keys, values and hidden units (ours; see `odelm.models.modulation`)."""
    lanes: int = 1
    """States side by side around the core, of which the block reads a mix and writes to all: hyper-connections (see
    `odelm.models.lanes`)."""
    parallel_branches: bool = False
    """Attention and MLP read the same state, instead of one after the other."""
    reference_depth: int | None = None
    """A depth at which learning rates were tuned. What the block adds is then scaled, and its last matrices are
    initialised, so that they hold at this depth too; None is this depth itself."""
    reference_width: int | None = None
    """A width at which learning rates were tuned. Embeddings, readout and the optimiser's rates are then scaled so that
    they hold at this width too; None is this width itself."""
    token_types: int = 0
    """Number of token-type (segment) embeddings; 0 is none."""
    sentence_order: bool = False
    """Encoder only: a head that predicts whether two segments are in order (ALBERT's second objective)."""
    outputs: int = 0
    """Encoder only: how many numbers a classifier reads from the first token: one for each class, or 1 for a
    regression; 0 is a language model. `data.task` sets it."""
    dropout: float = 0.0
    """Rate on the embeddings and on both branches' outputs, applied only where a key is given."""
    attention: str = "auto"
    """Its implementation: `xla`, `cudnn` (GPU, 16 bits), `splash` (TPU, lengths that are multiples of 128; elsewhere it
    is interpreted, for tests), or `auto`, which takes cuDNN where it was measured to pay, and splash on TPUs."""
    dtype: str = "auto"
    """Of matrix products; `auto` is bfloat16 on GPU and TPU, float32 on CPU. Parameters are float32."""
    residual_dtype: str = "auto"
    """Of the integrated state; `auto` is the same as `dtype`."""

    @property
    def ends(self) -> int:
        """Blocks of their own: prelude and coda."""
        return self.prelude + self.coda

    @property
    def core(self) -> int:
        """Length of the depth time that is integrated: unit steps between prelude and coda."""
        return self.depth - self.ends

    @property
    def feedforward_size(self) -> int:
        return self.feedforward or 4 * self.width

    @property
    def embed_size(self) -> int:
        return self.embed_dim or self.width

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    def validate(self) -> "ModelConfig":
        """Returns self, or raises InputError naming the first invalid field."""
        check_types(self, "model")
        choice("model.kind", self.kind, KINDS)
        choice("model.norm", self.norm, NORMS)
        choice("model.norm_placement", self.norm_placement, NORM_PLACEMENTS)
        choice("model.activation", self.activation, ACTIVATIONS)
        choice("model.positions", self.positions, POSITIONS)
        choice("model.attention", self.attention, ATTENTIONS)
        choice("model.dtype", self.dtype, DTYPES)
        choice("model.residual_dtype", self.residual_dtype, DTYPES)
        for name in (
            "vocab_size",
            "width",
            "heads",
            "depth",
            "groups",
            "inner_blocks",
            "lanes",
            "kv_span",
            "max_length",
        ):
            positive(f"model.{name}", getattr(self, name))
        for name in ("kv_heads", "feedforward", "embed_dim", "reference_depth", "reference_width"):
            if getattr(self, name) is not None:
                positive(f"model.{name}", getattr(self, name))
        divides("model.heads", self.heads, "model.width", self.width)
        divides("model.kv_heads", self.key_value_heads, "model.heads", self.heads)
        if self.prelude < 0 or self.coda < 0 or self.core < 1:
            raise InputError(
                f"model.prelude is {self.prelude} and model.coda {self.coda}, expected 0 or more, together below "
                f"model.depth, {self.depth}: between them lies the shared core"
            )
        divides("model.groups", self.groups, "model.depth" if not self.ends else "the core's depth", self.core)
        within("model.dropout", self.dropout, 0.0, 1.0)
        for name, usual in (("norm_eps", "1e-6"), ("rotary_base", "10000")):
            if getattr(self, name) <= 0:
                raise InputError(f"model.{name} is {getattr(self, name)}, expected a positive number such as {usual}")
        for name in ("token_types", "layer_rank", "outputs"):
            if getattr(self, name) < 0:
                raise InputError(f"model.{name} is {getattr(self, name)}, expected 0 or more")
        self._check_combinations()
        return self

    def _check_combinations(self) -> None:
        """Checks options that are valid only together."""
        if self.reference_depth is not None and self.reference_depth <= self.ends:
            raise InputError(
                f"model.reference_depth is {self.reference_depth}, expected more than the {self.ends} layers of its "
                "prelude and coda"
            )
        if self.wide_modulation and not self.time_modulation:
            raise InputError("model.wide_modulation is True, but model.time_modulation is False: set that to True")
        if self.lanes > 1 and self.norm_placement == "post":
            raise InputError(
                f"model.lanes is {self.lanes}, but a post-norm block writes its whole state: expected 1, or "
                "model.norm_placement='pre'"
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise InputError(
                f"model.width / model.heads is {self.head_size}, but rotary positions turn pairs: expected an "
                f"even head size; try model.heads={nearest_divisor(self.width // 2, self.heads)}"
            )
        if self.positions == "sinusoidal" and self.embed_size % 2:
            raise InputError(f"sinusoidal positions come in pairs, but the embedding size is {self.embed_size} (odd)")
        if self.sentence_order and self.kind != "encoder":
            raise InputError("model.sentence_order is True, but only model.kind='encoder' has that head")
        if self.outputs and (self.kind != "encoder" or self.sentence_order):
            wrong = "model.sentence_order is True" if self.sentence_order else f"model.kind is {self.kind!r}"
            raise InputError(
                f"model.outputs is {self.outputs}, but {wrong}: a classifier is an encoder with one head; set "
                "model.kind='encoder' and model.sentence_order=False"
            )

"""Embeddings and masked tokens of an encoder, for batches of texts of any lengths: `odelm.EncoderRunner`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from odelm import ode
from odelm.arguments import whole, wholes
from odelm.errors import InputError, nearest
from odelm.infer import on_gpu
from odelm.infer.narrowing import encode_narrowing
from odelm.infer.prompts import SMALLEST_BUCKET, power_of_two, read_texts
from odelm.infer.runner import Runner, check_model, with_dtype
from odelm.models import Classifier, Encoder, MaskedLM
from odelm.models.early_exit import EarlyExit, check_exits
from odelm.models.inputs import Inputs, within
from odelm.models.transformer import DepthPlan, Grid
from odelm.tokenizer import checked, find_id, special_id

POOLINGS = ("mean", "first", "none")
SPLASH_BUCKET = 128
"""The smallest padded length with `model.attention="splash"`, which takes multiples of this number."""

Texts = Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Filled:
    """One masked place of a text, and its most likely tokens, the likeliest first."""

    place: int
    """Its index among the text's token ids, special ones included."""
    ids: tuple[int, ...]
    probabilities: tuple[float, ...]
    """The probability of each token, among all tokens of the vocabulary."""
    tokens: tuple[str, ...] | None
    """Their text; None without a tokenizer."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Encoded:
    """A batch of B texts of up to L tokens."""

    hidden: jax.Array
    """(B, L, D), in the dtype of the state; meaningless at padding."""
    mean: jax.Array
    """float32 (B, D), the mean of `hidden` over the tokens of each text."""
    first: jax.Array
    """float32 (B, D), the hidden state of each text's first token."""


class EncoderRunner:
    """Runs an encoder on texts: strings, or lists of token ids.

    Parameters are cast once. All that depends only on time (the scale and shift of each norm with its modulation, the
    gates, and the residuals of the layers) is in `plan`, which `model.plan` computes once; no call computes it again.

    A string is tokenised with the special tokens that the tokenizer adds. A tokenizer that has a class and a separator
    token but no rule for placing them, as in training runs, gets the rule used in training: one before each text and
    one after. Texts are sorted by length; lengths and batches are padded to powers of two, so that few programs serve
    all. A text's result does not depend on its batch, up to rounding. Later processes reuse compiled programs if JAX's
    persistent cache is on (`JAX_COMPILATION_CACHE_DIR`).

    Args:
        steps, grid, solver: how the depth is crossed, as in `model.plan`; full depth by default.
        dtype: of matrix products and the state, as `model.dtype`; None keeps the model's.
        early_exit: when a text leaves those steps early, as in `odelm.EarlyExit`; a batch shrinks as its texts leave.

    Raises InputError for a decoder, and for options that `model.plan` rejects.
    """

    def __init__(
        self,
        model: MaskedLM | Encoder | Classifier,
        tokenizer: Tokenizer | None = None,
        *,
        steps: int | None = None,
        grid: Grid | None = None,
        solver: ode.Solver = "euler",
        dtype: str | None = None,
        early_exit: EarlyExit | None = None,
    ):
        check_model(model, "encoder")
        self.runner = Runner.of(model if dtype is None else with_dtype(model, dtype))
        self.plan = self.runner.model.plan(steps=steps, grid=grid, solver=solver)
        tokenizer = checked(tokenizer)
        self.tokenizer = None if tokenizer is None else _prepared(tokenizer)
        self.early_exit = early_exit
        if early_exit is not None:
            check_exits(self.runner.model, self.plan, early_exit)

    def embed(self, texts: Texts, *, pooling: str = "mean", batch_size: int = 32) -> np.ndarray | list[np.ndarray]:
        """Returns an embedding of each text, float32 (n, D), in the order given.

        `pooling` is "mean", the mean of the last hidden states over a text's tokens, special ones included; "first",
        the state of its first token; or "none", which returns a list with all states of each text, float32 (length, D).
        `batch_size` is the maximum number of texts in a batch. Raises InputError for another pooling, and for invalid
        texts: see `fill`.
        """
        if pooling not in POOLINGS:
            raise InputError(f"pooling is {pooling!r}; {nearest(pooling, POOLINGS)}")
        given = self._ids(texts)
        batches = self._encoded(given, batch_size)
        if pooling == "none":
            hidden = {
                row: one[: len(given[row])].astype(np.float32)
                for rows, encoded in batches
                for row, one in zip(rows, np.asarray(encoded.hidden), strict=False)
            }
            return [hidden[row] for row in range(len(given))]
        # Pooled states are small and stay on the device, so that a batch is sent before the previous one is done.
        pooled = [(rows, encoded.mean if pooling == "mean" else encoded.first) for rows, encoded in batches]
        found = np.zeros((len(given), self.runner.model.config.width), np.float32)
        for rows, embeddings in pooled:
            found[rows] = np.asarray(embeddings)[: len(rows)]
        return found

    def fill(
        self, texts: Texts, *, top: int = 5, batch_size: int = 32, mask_id: int | None = None
    ) -> list[list[Filled]]:
        """Returns for each text its masked places, in order, with their `top` most likely tokens.

        A place is masked if it has the tokenizer's mask token, or `mask_id`, which is needed where there is no
        tokenizer. A text without such a place has an empty list. Raises InputError if there is no mask token, for a
        model that predicts no tokens, for texts that are empty, too long for the model or have ids out of range, and
        for an option out of its range.
        """
        model = self.runner.model
        if not isinstance(model, MaskedLM):
            raise InputError(f"tokens are predicted by a MaskedLM; this model is of class {type(model).__name__}")
        self._check_top(top)
        mask = self._mask(mask_id)
        given = self._ids(texts)
        likely = []
        for rows, encoded in self._encoded(given, batch_size):
            places = [(i, place) for i, row in enumerate(rows) for place, id in enumerate(given[row]) if id == mask]
            if places:
                owners = [(rows[i], place) for i, place in places]
                likely.append((owners, self._likely(encoded.hidden, places, top)))
        found: list[list[Filled]] = [[] for _ in given]
        for owners, arrays in likely:
            listed = (np.asarray(array).tolist() for array in arrays)
            for (row, place), ids, chances in zip(owners, *listed, strict=False):
                found[row].append(Filled(place, tuple(ids), tuple(chances), self._texts(ids)))
        return found

    def warm_up(self, lengths: Sequence[int], batch_sizes: Sequence[int], *, top: int = 5) -> None:
        """Compiles the programs for texts of these lengths in batches of these sizes, ahead of the first call.

        The programs serve `embed` with any pooling, and `fill` with the same `top` and up to one masked place for each
        text. Raises InputError for a length that the model cannot take, or a size below 1.
        """
        limit = self.runner.model.config.max_length
        lengths = wholes("lengths", lengths, most=limit, expected=f"1 to model.max_length, {limit}")
        batch_sizes = wholes("batch_sizes", batch_sizes)
        self._check_top(top)
        shapes = {(power_of_two(size), self._bucket(length)) for size in batch_sizes for length in lengths}
        for B, L in sorted(shapes):
            encoded = self._encode(np.zeros((B, L), np.int32), np.ones(B, np.int32))
            if isinstance(self.runner.model, MaskedLM):
                self._likely(encoded.hidden, [(0, 0)], top)
            jax.block_until_ready(encoded)

    def _encoded(self, given: list[list[int]], batch_size: int) -> Iterator[tuple[list[int], Encoded]]:
        """Yields the indices of a batch's texts, and the encoded batch, whose last rows may be padding."""
        batch_size = whole("batch_size", batch_size)
        # The longest first: the last batch may need rows of padding, which cost least if its texts are the shortest.
        order = sorted(range(len(given)), key=lambda row: -len(given[row]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = np.zeros((power_of_two(len(rows)), self._bucket(len(given[rows[0]]))), np.int32)
            lengths = np.ones(len(tokens), np.int32)
            for i, row in enumerate(rows):
                lengths[i] = len(given[row])
                tokens[i, : lengths[i]] = given[row]
            yield rows, self._encode(tokens, lengths)

    def _encode(self, tokens: np.ndarray, lengths: np.ndarray) -> Encoded:
        return _encode(self.runner.graph, self.runner.params, self.plan, self.early_exit, tokens, lengths)

    def _likely(self, hidden: jax.Array, places: list[tuple[int, int]], top: int) -> tuple[jax.Array, jax.Array]:
        """Returns the result of the function `_likely` at each place (row, position), followed by rows of padding."""
        padded = np.zeros((max(power_of_two(len(places)), len(hidden)), 2), np.int32)
        padded[: len(places)] = places
        return _likely(self.runner.graph, self.runner.params, hidden, padded, top=top)

    def _check_top(self, top: int) -> None:
        size = self.runner.model.config.vocab_size
        whole("top", top, most=size, expected=f"1 to model.vocab_size, {size}")

    def _texts(self, ids: list[int]) -> tuple[str, ...] | None:
        if self.tokenizer is None:
            return None
        return tuple(self.tokenizer.decode([id], skip_special_tokens=False) for id in ids)

    def _bucket(self, length: int) -> int:
        config = self.runner.model.config
        smallest = SPLASH_BUCKET if config.attention == "splash" else SMALLEST_BUCKET
        return min(max(power_of_two(length), smallest), config.max_length)

    def _mask(self, mask_id: int | None) -> int:
        """Returns the id of the mask token."""
        if mask_id is None:
            if self.tokenizer is None:
                raise InputError("there is no tokenizer with a mask token: give mask_id, which marks a masked place")
            return special_id(self.tokenizer, "mask")
        last = self.runner.model.config.vocab_size - 1
        return whole("mask_id", mask_id, least=0, most=last, expected=f"0 to {last}")

    def _ids(self, texts: Texts) -> list[list[int]]:
        """Returns the token ids of each text; InputError for one that the model cannot take."""
        tokenizer, config = self.tokenizer, self.runner.model.config
        given = read_texts("text", texts, tokenizer and (lambda text: tokenizer.encode(text).ids), config)
        for number, ids in enumerate(given):
            if len(ids) > config.max_length:
                raise InputError(
                    f"text {number} has {len(ids)} tokens, more than model.max_length {config.max_length}: shorten it"
                )
        return given


def _prepared(tokenizer: Tokenizer) -> Tokenizer:
    """Returns a copy that neither pads nor truncates; if it adds no special tokens, it gets those of training.

    If a word's token includes the space before it, a mask in its place includes that space too, as in training.
    """
    saved, mask = json.loads(tokenizer.to_str()), find_id(tokenizer, "mask")
    if any(kind in json.dumps(saved.get("pre_tokenizer")) for kind in ("ByteLevel", "Metaspace")):
        for token in saved["added_tokens"]:
            token["lstrip"] |= token["id"] == mask
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    cls, sep = (find_id(tokenizer, role) for role in ("cls", "sep"))
    if tokenizer.post_processor is None and cls is not None and sep is not None:
        first, last = tokenizer.id_to_token(cls), tokenizer.id_to_token(sep)
        tokenizer.post_processor = TemplateProcessing(
            single=[first, "$A", last], special_tokens=[(first, cls), (last, sep)]
        )
    return tokenizer


@partial(on_gpu.BySize, texts=4, static_argnums=0)
def _encode(
    graph: nnx.GraphDef,
    params: Any,
    plan: DepthPlan,
    early_exit: EarlyExit | None,
    tokens: jax.Array,
    lengths: jax.Array,
) -> Encoded:
    model, inputs = nnx.merge(graph, params), Inputs(tokens, lengths=lengths)
    model, plan = on_gpu.ready_to_read(model, plan, tokens.size)
    if early_exit is None:
        hidden, _ = model.run(inputs, plan)
    else:
        hidden, _ = encode_narrowing(model, inputs, plan, early_exit)
    real = within(lengths, tokens.shape[1])
    total = jnp.where(real[..., None], hidden.astype(jnp.float32), 0).sum(1)
    return Encoded(hidden, total / lengths[:, None].astype(jnp.float32), hidden[:, 0].astype(jnp.float32))


@partial(jax.jit, static_argnums=0, static_argnames="top")
def _likely(
    graph: nnx.GraphDef, params: Any, hidden: jax.Array, places: jax.Array, *, top: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the likeliest tokens and their probabilities (M, top) at places (M, 2) of hidden states (B, L, D)."""
    logits = nnx.merge(graph, params).readout(hidden[places[:, 0], places[:, 1]])
    chances, ids = jax.lax.top_k(jax.nn.softmax(logits), top)
    return ids, chances

"""Log-likelihoods of texts at several step counts: many texts at once, and the parameters prepared once."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Encoding, Tokenizer

from odelm.compiling import side_by_side
from odelm.errors import InputError
from odelm.evals.predictions import Prediction, encode_pair, masked_in_turn, texts_of, windows
from odelm.infer.encoder_runner import SPLASH_BUCKET, EncoderRunner
from odelm.infer.prompts import SMALLEST_BUCKET, power_of_two
from odelm.infer.runner import Runner
from odelm.models import CausalLM, Classifier, Encoder, MaskedLM
from odelm.models.arrays import lookup
from odelm.models.cross_entropy import PIECE_BYTES, cross_entropy
from odelm.models.inputs import Inputs
from odelm.models.stretches import evaluations_of, in_one_shape
from odelm.models.transformer import DepthPlan
from odelm.tokenizer import end_id, needed, special_id

Model = CausalLM | MaskedLM | Classifier | Encoder
Pair = tuple[str, str]
"""A context, which may be empty, and the text after it, whose likelihood is computed."""
Row = tuple[int, Prediction]
"""The index of a text, and one of its rows."""
LENGTH = 128
"""How long the rows of a batch of `batch_size` rows are; of longer ones it has fewer, of shorter ones more."""
TEXTS = 4096
"""How many texts are tokenised at once: what the tokenizer returns of a token is large."""
PIECE = 1024
"""For how many predictions logits are computed at once, if they are not too large."""


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a text given its context."""

    log: float
    """The natural logarithm of its probability; for an encoder, of its pseudo-likelihood."""
    greedy: bool
    """Whether each of its tokens is the likeliest one at its place."""
    tokens: int
    """How many tokens were predicted."""


class Scorer:
    """Reports how likely texts are to a language model, at each of some step counts.

    For a decoder, the likelihood of a text is that of its tokens given those before, as `encode_pair` and `windows`
    make them. For an encoder it is the pseudo-likelihood, with each token masked in turn and without a context.

    Args:
        steps: numbers of equal steps over the core; a plan is made of each, once.
        batch_size: rows of `LENGTH` tokens in a batch; of longer ones it has fewer, of shorter ones more.
        end_token: the name of the token that ends a text, if it is none of the usual ones.

    Raises InputError for a model that is not a language model or has no tokenizer, and for steps that it cannot take.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        *,
        steps: Sequence[int],
        solver: str = "euler",
        batch_size: int = 32,
        end_token: str = "",
    ):
        if not isinstance(model, CausalLM | MaskedLM):
            raise InputError(f"tasks are for language models; this model is of class {type(model).__name__}")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, expected 1 or more")
        self.tokenizer = needed(tokenizer)
        self.masked = isinstance(model, MaskedLM)
        if isinstance(model, MaskedLM):
            ready = EncoderRunner(model, tokenizer)
            self.runner, self.tokenizer = ready.runner, needed(ready.tokenizer)
            self._mask = special_id(self.tokenizer, "mask")
        else:
            self.runner = Runner.of(model)
            self._start = end_id(self.tokenizer, end_token)
        self.plans = {count: self.runner.plan(count, solver) for count in sorted(set(steps), reverse=True)}
        self._in_one_shape = dict(zip(self.plans, in_one_shape(list(self.plans.values())), strict=True))
        self.batch_size = batch_size

    @property
    def vocab_size(self) -> int:
        return self.runner.model.config.vocab_size

    def evaluations(self, steps: int) -> int:
        """Returns how often a forward pass applies a block, prelude and coda included."""
        return evaluations_of(self.plans[steps])

    def __call__(self, pairs: Sequence[Pair]) -> dict[int, list[Likelihood]]:
        """Returns the likelihood of each text by the step count, in the order given.

        Raises InputError for a text without tokens; for an encoder, also for one that is longer than its positions.
        """
        return self.likelihoods(self.predictions(pairs))

    def predictions(self, pairs: Sequence[Pair]) -> list[list[Prediction]]:
        """Returns for each text the rows that its likelihood is computed from."""
        if self.masked:
            return self._masked_in_turn(pairs)
        texts = list(dict.fromkeys(text for pair in pairs for text in texts_of(*pair)))
        known = {text: found.ids for text, found in zip(texts, self._tokenized(texts), strict=True)}

        def encode(text: str) -> list[int]:
            return known[text] if text in known else self._encode(text)

        limit = self.runner.model.config.max_length
        return [windows(*encode_pair(encode, *pair, self._start), limit) for pair in pairs]

    def likelihoods(self, predictions: Sequence[Sequence[Prediction]]) -> dict[int, list[Likelihood]]:
        """Returns the likelihood of each text by the step count, given its rows."""
        if not predictions:
            return {steps: [] for steps in self.plans}
        rows = [(text, row) for text, of_text in enumerate(predictions) for row in of_text]
        by_shape = [list(batches) for _, batches in itertools.groupby(self._batches(rows), key=lambda batch: batch[:2])]
        sent = side_by_side(lambda batches: [self._sent(*batch) for batch in batches], by_shape)
        # Results are small and are fetched last, so that a batch is sent before the previous one is done.
        found = jax.device_get([batch for of_shape in sent for batch in of_shape])
        texts = np.concatenate([owners for owners, _ in found])
        tokens = np.bincount(texts).tolist()

        def at(steps: int) -> list[Likelihood]:
            logs, hits = (np.concatenate([of[steps][i][: len(owners)] for owners, of in found]) for i in (0, 1))
            log, misses = np.bincount(texts, logs).tolist(), np.bincount(texts, ~hits)
            return [Likelihood(*one) for one in zip(log, (misses == 0).tolist(), tokens, strict=True)]

        return {steps: at(steps) for steps in self.plans}

    def forward(self, steps: int, length: int) -> jax.Array:
        """Returns the log-probabilities of a whole batch of random rows of so many tokens: what is timed.

        Its program is the step count's own, because a loop of unknown length may be slower.
        """
        B, L = self.batch_size, self._length(length)
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, (B, L), np.int32)
        return self._predicted(self.plans[steps], tokens, np.full(B, L, np.int32), np.arange(B) * L, np.zeros(B))[0]

    def context(self, text: str) -> list[int]:
        """Returns the token ids of a text that a decoder is to continue; for an empty text, the end-of-text token."""
        return self._encode(text) or [self._start]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _tokenized(self, texts: Sequence[str]) -> Iterator[Encoding]:
        """Yields the encoding of each text, many of which are tokenised at once, on all cores."""
        for start in range(0, len(texts), TEXTS):
            part = texts[start : start + TEXTS]
            yield from self.tokenizer.encode_batch_fast(part, add_special_tokens=self.masked)

    def _masked_in_turn(self, pairs: Sequence[Pair]) -> list[list[Prediction]]:
        if any(context for context, _ in pairs):
            raise InputError("the likelihood of a text after a context is a decoder's; this model is an encoder")
        texts, limit, found = [text.strip() for _, text in pairs], self.runner.model.config.max_length, []
        for text, encoding in zip(texts, self._tokenized(texts), strict=True):
            if len(encoding) > limit:
                raise InputError(
                    f"the text {text!r:.60} has {len(encoding)} tokens, past the model's {limit} positions"
                )
            found.append(masked_in_turn(encoding.ids, encoding.special_tokens_mask, self._mask))
            if not found[-1]:
                raise InputError(f"the text {text!r:.60} has no tokens, so that nothing is predicted: leave it out")
        return found

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[int, int, Sequence[Row]]]:
        """Yields the shape (B, L) and the rows of each batch."""
        # The longest first: the last batch may need rows of padding, which cost least if its texts are the shortest.
        rows = sorted(rows, key=lambda row: -len(row[1].tokens))
        tokens = self.batch_size * min(LENGTH, self.runner.model.config.max_length)
        start = B = L = 0
        while start < len(rows):
            # Filling up a batch costs less than compiling another program for it.
            if len(rows) - start > B:
                L = self._length(len(rows[start][1].tokens))
                B = min(max(tokens // L, 1), power_of_two(len(rows)))
            yield B, L, rows[start : start + B]
            start += B

    def _sent(self, B: int, L: int, rows: Sequence[Row]) -> tuple[np.ndarray, dict[int, tuple[jax.Array, jax.Array]]]:
        """Sends a batch to the device; returns the text of each of its n predictions, int (n,), and what `_predicted`
        returns by the step count."""
        tokens, lengths = np.zeros((B, L), np.int32), np.ones(B, np.int32)
        for i, (_, row) in enumerate(rows):
            lengths[i] = len(row.tokens)
            tokens[i, : lengths[i]] = row.tokens
        places = np.concatenate([np.asarray(row.places) + i * L for i, (_, row) in enumerate(rows)])
        targets = np.concatenate([row.targets for _, row in rows])
        texts = np.repeat([text for text, _ in rows], [len(row.places) for _, row in rows])
        data = tokens, lengths, places, targets
        return texts, {steps: self._predicted(plan, *data) for steps, plan in self._in_one_shape.items()}

    def _predicted(
        self, plan: DepthPlan, tokens: np.ndarray, lengths: np.ndarray, places: np.ndarray, targets: np.ndarray
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the result of the function `_predicted` for n predictions, followed by padding."""
        piece = min(PIECE, max(PIECE_BYTES // (4 * self.vocab_size), 1), tokens.size)
        room = -(-tokens.size // piece) * piece
        arrays = (np.pad(array.astype(np.int32), (0, room - len(array))) for array in (places, targets))
        known = lengths if self.masked else None  # a decoder does not see the padding, which comes last
        inputs, count = Inputs(tokens, lengths=known), np.int32(len(places))
        return _predicted(self.runner.graph, self.runner.params, plan, inputs, count, *arrays, piece=piece)

    def _length(self, longest: int) -> int:
        """Returns the padded length of rows: few lengths, so that few programs are compiled."""
        config = self.runner.model.config
        smallest = SPLASH_BUCKET if config.attention == "splash" else SMALLEST_BUCKET
        return min(max(power_of_two(longest), smallest), config.max_length)


@partial(jax.jit, static_argnums=0, static_argnames="piece")
def _predicted(
    graph: nnx.GraphDef,
    params: Any,
    plan: DepthPlan,
    inputs: Inputs,
    count: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    *,
    piece: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each of the first `count` targets at its place among the B * L of the batch,
    float32 (M,), and whether it is the likeliest token.

    The logits of `piece` of them, a divisor of M, are in memory at once, and no others are computed.
    """
    model = nnx.merge(graph, params)
    hidden, _ = model.run(inputs, plan)
    states = hidden.reshape(-1, hidden.shape[-1])

    def read(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = number * piece
        at, wanted = (jax.lax.dynamic_slice_in_dim(array, start, piece) for array in (places, targets))
        logits = model.readout(lookup(states, at)[None])[0].astype(jnp.float32)
        new = -cross_entropy(logits, wanted)[1], logits.argmax(-1).astype(wanted.dtype) == wanted
        return jax.tree.map(lambda all, part: jax.lax.dynamic_update_slice_in_dim(all, part, start, 0), found, new)

    empty = jnp.zeros(places.shape, jnp.float32), jnp.zeros(places.shape, bool)
    return jax.lax.fori_loop(0, (count + piece - 1) // piece, read, empty)

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
from tokenizers import Tokenizer

from odelm.compiling import side_by_side
from odelm.errors import InputError
from odelm.evals.predictions import Prediction, encode_pair, masked_in_turn, windows
from odelm.infer.encoder_runner import SPLASH_BUCKET, EncoderRunner
from odelm.infer.prompts import SMALLEST_BUCKET, power_of_two
from odelm.infer.runner import Runner
from odelm.models import CausalLM, Classifier, Encoder, MaskedLM
from odelm.models.arrays import pick
from odelm.models.cross_entropy import PIECE_BYTES, cross_entropy
from odelm.models.inputs import Inputs
from odelm.models.stretches import evaluations_of
from odelm.models.transformer import DepthPlan
from odelm.tokenizer import end_id, needed, special_id

Model = CausalLM | MaskedLM | Classifier | Encoder
Pair = tuple[str, str]
"""A context, which may be empty, and the text after it, whose likelihood is computed."""


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
        batch_size: rows in a batch.
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
        predictions = [self.predictions(pair) for pair in pairs]
        rows = [row for of_pair in predictions for row in of_pair]
        batches = list(self._batches(rows))
        found = side_by_side(lambda steps: self._scored(self.plans[steps], batches, len(rows)), self.plans)
        ends = np.cumsum([0, *map(len, predictions)]).tolist()
        return {
            steps: [
                Likelihood(float(log[a:b].sum()), bool(hit[a:b].all()), sum(len(row.targets) for row in rows[a:b]))
                for a, b in itertools.pairwise(ends)
            ]
            for steps, (log, hit) in zip(self.plans, found, strict=True)
        }

    def predictions(self, pair: Pair) -> list[Prediction]:
        """Returns the rows that the likelihood of a text is computed from."""
        context, text = pair
        limit = self.runner.model.config.max_length
        if not self.masked:
            return windows(*encode_pair(self._encode, context, text, self._start), limit)
        if context:
            raise InputError("the likelihood of a text after a context is a decoder's; this model is an encoder")
        encoding = self.tokenizer.encode(text.strip())
        if len(encoding) > limit:
            raise InputError(f"the text {text!r:.60} has {len(encoding)} tokens, past the model's {limit} positions")
        found = masked_in_turn(encoding.ids, encoding.special_tokens_mask, self._mask)
        if not found:
            raise InputError(f"the text {text!r:.60} has no tokens, so that nothing is predicted: leave it out")
        return found

    def forward(self, steps: int, length: int) -> jax.Array:
        """Returns the log-probabilities of a whole batch of random rows of so many tokens: what is timed."""
        B, L = power_of_two(self.batch_size), self._length(length)
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, (B, L), np.int32)
        places = np.zeros((B, self._width(1, L)), np.int32)
        return self._predicted(self.plans[steps], (tokens, np.full(B, L, np.int32), places, places))[0]

    def context(self, text: str) -> list[int]:
        """Returns the token ids of a text that a decoder is to continue; for an empty text, the end-of-text token."""
        return self._encode(text) or [self._start]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _scored(self, plan: DepthPlan, batches: Sequence[tuple], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the log-probability of each row, float64 (rows,), and whether it is greedy, bool (rows,)."""
        log, greedy = np.zeros(rows), np.zeros(rows, bool)
        # Results are small and are fetched last, so that a batch is sent before the previous one is done.
        sent = [(members, real, self._predicted(plan, data)) for members, real, data in batches]
        for members, real, (logs, hits) in sent:
            used = slice(len(members))
            log[members] = np.where(real, np.asarray(logs, np.float64), 0)[used].sum(axis=1)
            greedy[members] = (np.asarray(hits) | ~real)[used].all(axis=1)
        return log, greedy

    def _predicted(self, plan: DepthPlan, data: tuple[np.ndarray, ...]) -> tuple[jax.Array, jax.Array]:
        tokens, lengths, places, targets = data
        held = max(PIECE_BYTES // (4 * places.shape[1] * self.vocab_size), 1)
        rows = min(len(tokens), 1 << (held.bit_length() - 1))
        known = lengths if self.masked else None  # a decoder does not see the padding, which comes last
        return _predicted(
            self.runner.graph, self.runner.params, plan, Inputs(tokens, lengths=known), places, targets, rows=rows
        )

    def _batches(self, rows: Sequence[Prediction]) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]]:
        """Yields the indices of the rows of a batch, which of its predictions are real, bool (B, P), and its arrays:
        tokens (B, L), their lengths (B,), places and targets (B, P), int32."""
        # The longest first: the last batch may need rows of padding, which cost least if its texts are the shortest.
        order = sorted(range(len(rows)), key=lambda row: (-len(rows[row].tokens), -len(rows[row].places)))
        for start in range(0, len(order), self.batch_size):
            members = order[start : start + self.batch_size]
            # Filling up a batch costs less than compiling another program for it.
            B = power_of_two(min(self.batch_size, len(rows)))
            L = self._length(len(rows[members[0]].tokens))
            P = self._width(max(len(rows[row].places) for row in members), L)
            tokens, lengths = np.zeros((B, L), np.int32), np.ones(B, np.int32)
            places, targets, real = np.zeros((B, P), np.int32), np.zeros((B, P), np.int32), np.zeros((B, P), bool)
            for i, row in enumerate(rows[member] for member in members):
                lengths[i], count = len(row.tokens), len(row.places)
                tokens[i, : lengths[i]] = row.tokens
                places[i, :count], targets[i, :count], real[i, :count] = row.places, row.targets, True
            yield np.asarray(members), real, (tokens, lengths, places, targets)

    def _length(self, longest: int) -> int:
        """Returns the padded length of rows: few lengths, so that few programs are compiled."""
        config = self.runner.model.config
        smallest = SPLASH_BUCKET if config.attention == "splash" else SMALLEST_BUCKET
        return min(max(power_of_two(longest), smallest), config.max_length)

    def _width(self, most: int, length: int) -> int:
        """Returns how many predictions a row has room for: 16, 64, 256, ... or one for each token; 1 for an encoder."""
        if self.masked:
            return 1
        return next((width for width in (16, 64, 256, 1024) if most <= width < length), length)


@partial(jax.jit, static_argnums=0, static_argnames="rows")
def _predicted(
    graph: nnx.GraphDef,
    params: Any,
    plan: DepthPlan,
    inputs: Inputs,
    places: jax.Array,
    targets: jax.Array,
    *,
    rows: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each target at its place, float32 (B, P), and whether it is the likeliest token.

    The logits of `rows` rows, a divisor of B, are in memory at once.
    """
    model = nnx.merge(graph, params)
    hidden, _ = model.run(inputs, plan)

    def read(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, targets = part
        logits = model.readout(states).astype(jnp.float32)
        return -cross_entropy(logits, targets)[1], logits.argmax(-1).astype(targets.dtype) == targets

    parts = (pick(hidden, places), targets)
    cut = jax.tree.map(lambda array: array.reshape(-1, rows, *array.shape[1:]), parts)
    return jax.tree.map(lambda array: array.reshape(targets.shape), jax.lax.map(read, cut))

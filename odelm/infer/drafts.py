"""The options of speculative decoding, its state from one round to the next, and its counts."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from odelm.arguments import number, shown, whole
from odelm.errors import InputError
from odelm.models.memory import Memory
from odelm.models.transformer import DepthPlan

DRAFT_LENGTH = 4
"""The maximum number of tokens in a draft, if nothing else is asked for."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drafting:
    """How tokens are drafted."""

    plan: DepthPlan
    """The coarse steps."""
    confidence: jax.Array | float | None = None
    """A draft ends after a place where the likeliest token has a smaller probability in all rows that are continued;
    None always drafts K tokens. The end does not depend on the token drawn there, so it changes no distribution."""
    length: int = dataclasses.field(default=DRAFT_LENGTH, metadata=dict(static=True))
    """K, the maximum number of tokens in a draft."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Speculating:
    """B rows being continued, each at its own place, up to N tokens each."""

    memory: Memory
    """The memory of full depth; its lengths (B,) count the tokens before `last`."""
    draft: Memory
    """The memory of the coarse steps, of the same positions."""
    last: jax.Array
    """int32 (B,), the newest token of each row: in `tokens`, but not yet in the memories."""
    tokens: jax.Array
    """int32 (B, N + 2K + 1), what was generated, with room for more than N; valid up to `counts`."""
    logprobs: jax.Array
    """float32, like `tokens`: the log-probability that full depth gave each of them."""
    counts: jax.Array
    """int32 (B,), how many tokens each row has in `tokens`."""
    done: jax.Array
    """bool (B,), whether a row has produced its end token."""
    seen: jax.Array | None
    """bool (B, V), which tokens occur in each row; None without a repetition penalty."""
    key: jax.Array
    rounds: jax.Array
    """int32 (B,), how often full depth verified a draft of each row."""
    drafted: jax.Array
    """int32 (B,), how many tokens were drafted for each row."""
    accepted: jax.Array
    """int32 (B,), how many of the drafted tokens are in `tokens`."""


@dataclass(frozen=True)
class DraftCounts:
    """Counts of the drafts of one call, over all its rows."""

    rounds: int
    """How often full depth verified a draft."""
    drafted: int
    accepted: int
    """How many tokens were drafted, and how many of these full depth accepted."""
    tokens: int
    """How many tokens of the text the rounds produced."""

    @classmethod
    def of(cls, state: Speculating, limit: int) -> "DraftCounts":
        """Returns the counts of a call that keeps up to `limit` tokens in each row."""
        counts = np.minimum(np.asarray(state.counts), limit)
        # The first token of each row is from the prompt.
        tokens = int(counts.sum()) - len(counts)
        return cls(int(state.rounds.sum()), int(state.drafted.sum()), int(state.accepted.sum()), tokens)

    @property
    def tokens_per_round(self) -> float:
        """The mean number of tokens from a pass at full depth: 1 without a draft."""
        return self.tokens / self.rounds if self.rounds else 1.0


def make_drafting(plan: DepthPlan, length: int | None = None, confidence: float | None = None) -> Drafting:
    """Returns how tokens are drafted along a plan, by default up to `DRAFT_LENGTH` at any confidence; InputError for an
    invalid length or probability."""
    length = DRAFT_LENGTH if length is None else whole("draft_length", length)
    if confidence is not None:
        confidence = number("draft_confidence", confidence, lambda x: 0 <= x <= 1, "a probability, 0 to 1")
    return Drafting(plan, jnp.float32(confidence) if confidence else None, length)


def check_no_drafts(**options: float | None) -> None:
    """Raises InputError for an option of drafts that was given, where there are no drafts."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name} is {shown(value)}, but there are no drafts: give draft_steps or draft_grid too")


def spare_places(length: int) -> int:
    """Returns how many spare places follow the requested tokens: a round may draft past the last of these, and a
    stopped row is still written to."""
    return 2 * length + 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draft:
    """Tokens drafted in one round, K places of which `count` are used."""

    memory: Memory
    last: jax.Array
    tokens: jax.Array
    """int32 (B, K)."""
    chances: jax.Array
    """float32 (B, K, V), the log-probabilities that the tokens were drawn with; minus infinity from `count` on."""
    count: jax.Array
    """int32 ()."""
    seen: jax.Array | None
    sure: jax.Array
    """bool (), whether to draft more."""

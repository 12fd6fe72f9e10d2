"""Decoding with a memory: the prompts in one pass, then a token at a time, all inside jitted functions.

Prompts of unequal lengths are padded at their ends and each row keeps its own positions, so that a row is computed as
it would be alone. Everything here is pure and works under the caller's own `jax.jit`.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from odelm.models import CausalLM
from odelm.models.inputs import Inputs
from odelm.models.memory import Memory
from odelm.models.transformer import DepthPlan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; numbers that may change without another compilation."""

    temperature: jax.Array | float = 0.0
    """What the logits are divided by; 0 takes the most likely token."""
    top_k: jax.Array | int = 0
    """Draw among so many most likely tokens; 0 is all."""
    top_p: jax.Array | float = 1.0
    """Draw among the most likely tokens that together have this probability (Holtzman et al. 2020, arXiv
    1904.09751)."""
    min_p: jax.Array | float = 0.0
    """Draw among tokens at least so probable, relative to the most likely one (Nguyen et al. 2024, arXiv
    2407.01082)."""
    repetition_penalty: jax.Array | float = 1.0
    """What the logits of tokens that stand before are divided by, or multiplied if they are negative (Keskar et al.
    2019, arXiv 1909.05858)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """B rows being continued, up to N tokens each."""

    memory: Memory
    last: jax.Array
    """int32 (B,), the newest token of each row: in `tokens`, but not yet in the memory."""
    positions: jax.Array
    """int32 (B,), its position."""
    tokens: jax.Array
    """int32 (B, N), what was generated; 0 from `count` on."""
    logprobs: jax.Array
    """float32 (B, N), the log-probability that the model gave each of them."""
    count: jax.Array
    """int32 (), how many there are."""
    done: jax.Array
    """bool (B,), whether a row has its end token."""
    seen: jax.Array | None
    """bool (B, V), the tokens that stand in each row; None without a repetition penalty."""
    key: jax.Array


def prefill(
    model: CausalLM,
    plan: DepthPlan,
    prompts: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    *,
    new_tokens: int,
    end: int,
    penalised: bool = False,
) -> Decoding:
    """Returns the state after the prompts, with the first token of each row.

    Args:
        prompts: int32 (B, P), padded at their ends with any token.
        lengths: int32 (B,), from 1 to P.
        new_tokens: N, for how many there is to be room.
        end: the token that ends a row; -1 is none.
        penalised: whether there is a repetition penalty, which takes a table of the vocabulary for each row.
    """
    B, P = prompts.shape
    real = jnp.arange(P, dtype=jnp.int32)[None] < lengths[:, None]
    memory = model.memory(plan, batch=B, room=P + new_tokens - 1)
    positions = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    hidden, memory = model.run(Inputs(prompts, positions=positions, mask=real), plan, memory=memory)
    assert memory is not None
    logits = model.readout(hidden[jnp.arange(B), lengths - 1])
    rows = jnp.arange(B)[:, None]
    vocabulary = model.config.vocab_size
    seen = jnp.zeros((B, vocabulary), bool).at[rows, prompts].max(real) if penalised else None
    empty = Decoding(
        memory, jnp.zeros(B, jnp.int32), lengths - 1, jnp.zeros((B, new_tokens), jnp.int32),
        jnp.zeros((B, new_tokens), jnp.float32), jnp.int32(0), jnp.zeros(B, bool), seen, key,
    )  # fmt: skip
    return _append(empty, logits, sampling, end)


def advance(
    model: CausalLM, plan: DepthPlan, state: Decoding, sampling: Sampling, until: jax.Array | int, *, end: int
) -> Decoding:
    """Returns the state with `until` tokens in each row, or fewer if all rows have ended."""

    def going(state: Decoding) -> jax.Array:
        return (state.count < until) & ~state.done.all()

    def step(state: Decoding) -> Decoding:
        inputs = Inputs(state.last[:, None], positions=state.positions[:, None])
        hidden, memory = model.run(inputs, plan, memory=state.memory)
        assert memory is not None
        return _append(dataclasses.replace(state, memory=memory), model.readout(hidden[:, 0]), sampling, end)

    return jax.lax.while_loop(going, step, state)


def _append(state: Decoding, logits: jax.Array, sampling: Sampling, end: int) -> Decoding:
    """Returns the state with one more token of each row, drawn from logits (B, V); a row that has ended gets `end`."""
    token = draw(logits, sampling, jax.random.fold_in(state.key, state.count), state.seen)
    token = jnp.where(state.done, end, token).astype(jnp.int32)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(token, 0)[:, None], axis=1)[:, 0]
    rows = jnp.arange(len(token))
    return dataclasses.replace(
        state,
        last=jnp.maximum(token, 0),
        positions=state.positions + 1,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.count)),
        logprobs=jax.lax.dynamic_update_slice(state.logprobs, logprob[:, None], (0, state.count)),
        count=state.count + 1,
        done=state.done | (token == end),
        seen=None if state.seen is None else state.seen.at[rows, token].set(True),
    )


def draw(logits: jax.Array, sampling: Sampling, key: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Returns a token for each row of float32 logits (B, V), int32 (B,)."""
    if seen is not None:
        penalty = jnp.asarray(sampling.repetition_penalty, logits.dtype)
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    greedy = jnp.asarray(sampling.temperature) == 0

    def sampled() -> jax.Array:
        scaled = logits / jnp.asarray(sampling.temperature, logits.dtype)
        ranked = jnp.sort(scaled, axis=-1, descending=True)
        chances = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(chances, axis=-1) - chances
        ranks = jnp.arange(logits.shape[-1])[None]
        top_k = jnp.where(jnp.asarray(sampling.top_k) > 0, sampling.top_k, logits.shape[-1])
        kept = (ranks < top_k) & (before < sampling.top_p) & (chances >= sampling.min_p * chances[:, :1])
        # Each rule keeps a beginning of the ranking, and at least the first.
        count = jnp.maximum(kept.sum(axis=-1, keepdims=True), 1)
        least = jnp.take_along_axis(ranked, count - 1, axis=-1)
        noise = jax.random.gumbel(key, logits.shape, logits.dtype)
        return jnp.argmax(jnp.where(scaled >= least, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)

    return jax.lax.cond(greedy, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32), sampled)

"""Decoding with a key-value cache: the prompts in one pass, then a token at a time, all inside jitted functions.

Prompts of unequal lengths are padded at their ends and each row keeps its own positions, so that a row is computed as
it would be in a batch of its own. Everything here is pure and works under the caller's own `jax.jit`.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from odelm.infer import on_gpu
from odelm.infer.sampling import Sampling, draw
from odelm.models import CausalLM
from odelm.models.early_exit import EarlyExit
from odelm.models.exit_pass import decode_with_exits
from odelm.models.inputs import Inputs, within
from odelm.models.memory import Memory
from odelm.models.retime import retimed
from odelm.models.stretches import evaluations_of
from odelm.models.transformer import DepthPlan


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
    """int32 (), how many tokens each row has in `tokens`."""
    done: jax.Array
    """bool (B,), whether a row has produced its end token."""
    seen: jax.Array | None
    """bool (B, V), which tokens occur in each row; None without a repetition penalty."""
    key: jax.Array
    evaluations: jax.Array | None = None
    """int32 (B, N), how often the blocks were evaluated for each of `tokens`; None without early exits."""


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
    prefill_plan: DepthPlan | None = None,
    early_exit: EarlyExit | None = None,
    window: int | None = None,
) -> Decoding:
    """Returns the state after the prompts, with the first token of each row.

    Args:
        plan: how new tokens cross the depth.
        prompts: int32 (B, P), padded at their ends with any token.
        lengths: int32 (B,), from 1 to P.
        new_tokens: N, how many new tokens to reserve room for.
        end: the token that ends a row; -1 is none.
        penalised: whether there is a repetition penalty, which needs a table of the vocabulary for each row.
        prefill_plan: how the prompts cross the depth; None is `plan`.
        early_exit: when new tokens leave the steps of `plan` early; pass the same to `advance` with the returned state.
        window: how many positions each token sees, its own included; the memory is then a ring
            (`odelm.models.memory.Memory`), and the text may be longer than the model's positions.
    """
    B = prompts.shape[0]
    logits, memory = read_prompts(model, prefill_plan or plan, prompts, lengths, window)
    if prefill_plan is not None:
        memory = retimed(model, memory, prefill_plan, plan)
    memory = memory.widened(new_tokens - 1 if window is None else min(new_tokens - 1, window))
    seen = seen_in(prompts, lengths, model.config.vocab_size) if penalised else None
    empty = Decoding(
        memory, jnp.zeros(B, jnp.int32), lengths - 1, jnp.zeros((B, new_tokens), jnp.int32),
        jnp.zeros((B, new_tokens), jnp.float32), jnp.int32(0), jnp.zeros(B, bool), seen, key,
        None if early_exit is None else jnp.zeros((B, new_tokens), jnp.int32),
    )  # fmt: skip
    return _append(empty, logits, sampling, end, evaluations_of(plan))


def read_prompts(
    model: CausalLM, plan: DepthPlan, prompts: jax.Array, lengths: jax.Array, window: int | None = None
) -> tuple[jax.Array, Memory]:
    """Returns the logits after each prompt, float32 (B, V), and a memory of all P places, in which attention ignores
    the places after a row's length."""
    B, P = prompts.shape
    memory = model.memory(plan, batch=B, room=P, window=window)
    positions = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    inputs = Inputs(prompts, positions=positions, lengths=lengths)
    hidden, memory = model.run(inputs, plan, memory=memory)
    assert memory is not None
    return model.readout(hidden[jnp.arange(B), lengths - 1]), memory


def seen_in(prompts: jax.Array, lengths: jax.Array, vocabulary: int) -> jax.Array:
    """Returns which tokens occur in each prompt, bool (B, V)."""
    B, P = prompts.shape
    return jnp.zeros((B, vocabulary), bool).at[jnp.arange(B)[:, None], prompts].max(within(lengths, P))


def advance(
    model: CausalLM,
    plan: DepthPlan,
    state: Decoding,
    sampling: Sampling,
    until: jax.Array | int,
    *,
    end: int,
    early_exit: EarlyExit | None = None,
) -> Decoding:
    """Returns the state with `until` tokens in each row, or fewer if all rows have ended.

    With an `early_exit`, a token whose state has settled crosses the rest of the depth in one step, and all tokens wait
    for the last of their batch.
    """
    model, plan = on_gpu.ready(model, plan, len(state.last))
    count = evaluations_of(plan)

    def going(state: Decoding) -> jax.Array:
        return (state.count < until) & ~state.done.all()

    def step(state: Decoding) -> Decoding:
        inputs = Inputs(state.last[:, None], positions=state.positions[:, None])
        evaluations = count
        if early_exit is None:
            hidden, memory = model.run(inputs, plan, memory=state.memory)
        else:
            hidden, evaluations, memory = decode_with_exits(model, inputs, plan, early_exit, state.memory, state.done)
        assert memory is not None
        state = dataclasses.replace(state, memory=memory)
        return _append(state, model.readout(hidden[:, 0]), sampling, end, evaluations)

    return jax.lax.while_loop(going, step, state)


def _append(state: Decoding, logits: jax.Array, sampling: Sampling, end: int, evaluations: jax.Array | int) -> Decoding:
    """Returns the state with one more token in each row, drawn from logits (B, V); a row that has ended gets `end`.
    `evaluations`, int32 () or (B,), is how often the blocks were evaluated for that token."""
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
        evaluations=None if state.evaluations is None else state.evaluations.at[:, state.count].set(evaluations),
    )

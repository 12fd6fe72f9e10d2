"""Speculative decoding: coarse steps draft a few tokens, full depth verifies them in one pass, with the same weights.

A drafted token `d` of probability `q` at coarse steps and `p` at full depth is accepted with probability min(1, p / q);
the first rejected token is replaced by one drawn from max(p - q, 0); if all are accepted, one more is drawn from `p`.
So every token is distributed as full depth draws it, and with temperature 0 the text is the same, up to the rounding of
a pass over several positions in place of one. Source: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1. Drafting
with the same block at fewer steps is our own: there is no second model, and the draft reads the keys and values that
full depth computed at the times it visits (`odelm.models.retime`).
"""

import dataclasses

import jax
import jax.numpy as jnp

from odelm.infer import on_gpu
from odelm.infer.decode import read_prompts, seen_in
from odelm.infer.drafts import Draft, Drafting, Speculating, spare_places
from odelm.infer.sampling import Sampling, draw, log_chances
from odelm.models import CausalLM
from odelm.models.inputs import Inputs
from odelm.models.memory import Array, Memory, placed
from odelm.models.retime import retimed
from odelm.models.transformer import DepthPlan


def start_speculating(
    model: CausalLM,
    plan: DepthPlan,
    drafting: Drafting,
    prompts: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    *,
    new_tokens: int,
    end: int,
    penalised: bool = False,
) -> Speculating:
    """Returns the state after the prompts, with the first token of each row; the arguments are those of `prefill`."""
    B = prompts.shape[0]
    logits, memory = read_prompts(model, plan, prompts, lengths)
    room = new_tokens + spare_places(drafting.length)
    memory = dataclasses.replace(memory, length=lengths).widened(room)
    seen = seen_in(prompts, lengths, model.config.vocab_size) if penalised else None
    last = draw(logits, sampling, jax.random.fold_in(key, 0), seen)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), last[:, None], axis=1)
    return Speculating(
        memory=memory,
        draft=retimed(model, memory, plan, drafting.plan),
        last=last,
        tokens=jnp.zeros((B, room), jnp.int32).at[:, :1].set(last[:, None]),
        logprobs=jnp.zeros((B, room), jnp.float32).at[:, :1].set(logprob),
        counts=jnp.ones(B, jnp.int32),
        done=last == end,
        seen=None if seen is None else seen.at[jnp.arange(B), last].set(True),
        key=key,
        rounds=jnp.zeros(B, jnp.int32),
        drafted=jnp.zeros(B, jnp.int32),
        accepted=jnp.zeros(B, jnp.int32),
    )


def speculate(
    model: CausalLM,
    plan: DepthPlan,
    drafting: Drafting,
    state: Speculating,
    sampling: Sampling,
    until: jax.Array | int,
    *,
    end: int,
) -> Speculating:
    """Returns the state with `until` tokens or a few more in each row, or fewer in those that have ended."""

    def active(state: Speculating) -> jax.Array:
        return ~state.done & (state.counts < until)

    rows = len(state.last)
    coarse, drafts = on_gpu.ready(model, drafting.plan, rows)
    drafting = dataclasses.replace(drafting, plan=drafts)
    _, plan = on_gpu.ready(model, plan, rows * (drafting.length + 1))

    def body(state: Speculating) -> Speculating:
        # Each round splits off its own key: `rounds` counts by row, and does not change for rows that wait.
        key, of_drafts, of_acceptance, of_rest = jax.random.split(state.key, 4)
        state = dataclasses.replace(state, key=key)
        draft = _draft(coarse, drafting, state, sampling, of_drafts, active(state))
        tokens = jnp.concatenate([state.last[:, None], draft.tokens], axis=1)
        inputs = Inputs(tokens, positions=_positions(model, state.memory.length, tokens.shape[1]))
        hidden, memory = model.run(inputs, plan, memory=state.memory)
        assert memory is not None
        logits = model.readout(hidden)
        exact = _chances_along(logits, draft.tokens, sampling, state.seen)
        accepted = _accepted(draft, exact, of_acceptance)
        rest = _rest(draft, exact, accepted, of_rest)
        after = _emit(state, draft, rest, accepted, logits, active(state), end)
        return _remember(model, after, state, plan, drafting, memory, draft)

    return jax.lax.while_loop(lambda state: active(state).any(), body, state)


def _positions(model: CausalLM, start: Array, count: int) -> jax.Array:
    """Returns `count` positions from `start` (B,), int32 (B, L); those past the model's limit are of tokens not
    kept."""
    places = jnp.asarray(start)[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jnp.minimum(places, model.config.max_length - 1)


def _draft(
    model: CausalLM, drafting: Drafting, state: Speculating, sampling: Sampling, key: jax.Array, active: jax.Array
) -> Draft:
    """Returns the tokens that coarse steps draft after each row's last token."""
    B, K, V = len(state.last), drafting.length, model.config.vocab_size

    def step(draft: Draft) -> Draft:
        i = draft.count
        inputs = Inputs(draft.last[:, None], positions=_positions(model, draft.memory.length, 1))
        hidden, memory = model.run(inputs, drafting.plan, memory=draft.memory)
        assert memory is not None
        logits = model.readout(hidden[:, 0])
        token = draw(logits, sampling, jax.random.fold_in(key, i), draft.seen)
        chances = log_chances(logits, sampling, draft.seen)
        if drafting.confidence is None:
            sure = draft.sure
        else:
            likeliest = jnp.exp(logits.max(axis=-1) - jax.nn.logsumexp(logits, axis=-1))
            sure = (active & (likeliest >= drafting.confidence)).any()
        return Draft(
            memory,
            last=token,
            tokens=jax.lax.dynamic_update_slice(draft.tokens, token[:, None], (0, i)),
            chances=jax.lax.dynamic_update_slice(draft.chances, chances[:, None], (0, i, 0)),
            count=i + 1,
            seen=None if draft.seen is None else draft.seen.at[jnp.arange(B), token].set(True),
            sure=sure,
        )

    none = jnp.full((B, K, V), -jnp.inf, jnp.float32)
    empty = Draft(
        state.draft, state.last, jnp.zeros((B, K), jnp.int32), none, jnp.int32(0), state.seen, jnp.array(True)
    )
    if drafting.confidence is None:
        # On a GPU each round of a loop whose length is unknown waits for its condition.
        return jax.lax.fori_loop(0, K, lambda _, draft: step(draft), empty)
    return jax.lax.while_loop(lambda draft: (draft.count < K) & draft.sure, step, empty)


def _chances_along(logits: jax.Array, drafted: jax.Array, sampling: Sampling, seen: jax.Array | None) -> jax.Array:
    """Returns the log-probabilities with which full depth draws at each place, (B, K + 1, V), given its logits
    there."""
    B, places, V = logits.shape
    if seen is not None:
        new = jax.nn.one_hot(drafted, V, dtype=jnp.int32).cumsum(axis=1) > 0
        seen = jnp.concatenate([seen[:, None], seen[:, None] | new], axis=1).reshape(B * places, V)
    return log_chances(logits.reshape(B * places, V), sampling, seen).reshape(B, places, V)


def _accepted(draft: Draft, exact: jax.Array, key: jax.Array) -> jax.Array:
    """Returns how many drafted tokens of each row are accepted, int32 (B,): those before the first rejected one."""
    at, places = draft.tokens[..., None], jnp.arange(draft.tokens.shape[1])[None]
    ratio = jnp.take_along_axis(exact[:, :-1], at, axis=2) - jnp.take_along_axis(draft.chances, at, axis=2)
    fits = jnp.log(jax.random.uniform(key, draft.tokens.shape, jnp.float32)) < ratio[..., 0]
    return jnp.cumprod((fits & (places < draft.count)).astype(jnp.int32), axis=1).sum(axis=1)


def _rest(draft: Draft, exact: jax.Array, accepted: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the token after the accepted ones, int32 (B,): drawn from max(p - q, 0) at that place, or from `p` where
    nothing was drafted."""
    rows = jnp.arange(len(accepted))
    drafted = jnp.pad(jnp.exp(draft.chances), ((0, 0), (0, 1), (0, 0)))[rows, accepted]
    exact = jnp.exp(exact[rows, accepted])
    left = jnp.maximum(exact - drafted, 0)
    # If nothing is left, the two are equal up to rounding.
    left = jnp.where(left.sum(axis=1, keepdims=True) > 0, left, exact)
    return jax.random.categorical(key, jnp.log(left)).astype(jnp.int32)


def _emit(
    state: Speculating,
    draft: Draft,
    rest: jax.Array,
    accepted: jax.Array,
    logits: jax.Array,
    active: jax.Array,
    end: int,
) -> Speculating:
    """Returns the state with the accepted tokens and the one after them, up to an end token, in active rows."""
    rows, places = jnp.arange(len(rest)), jnp.arange(logits.shape[1])[None]
    tokens = jnp.where(places == accepted[:, None], rest[:, None], jnp.pad(draft.tokens, ((0, 0), (0, 1))))
    ends = (tokens == end) & (places <= accepted[:, None])
    taken = jnp.where(active, jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1), accepted) + 1, 0)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=2)[..., 0]
    seen = state.seen
    if seen is not None:
        seen = seen.at[rows[:, None], tokens].max(places < taken[:, None])
    return dataclasses.replace(
        state,
        last=jnp.where(active, tokens[rows, accepted], state.last),
        tokens=placed(state.tokens, tokens, state.counts),
        logprobs=placed(state.logprobs, logprobs, state.counts),
        counts=state.counts + taken,
        done=state.done | (active & ends.any(axis=1)),
        seen=seen,
        rounds=state.rounds + active,
        drafted=state.drafted + jnp.where(active, draft.count, 0),
        accepted=state.accepted + jnp.minimum(accepted, taken),
    )


def _remember(
    model: CausalLM,
    after: Speculating,
    before: Speculating,
    plan: DepthPlan,
    drafting: Drafting,
    memory: Memory,
    draft: Draft,
) -> Speculating:
    """Returns the state with the memories that a round wrote, up to the accepted tokens.

    The draft's memory gets the keys and values that full depth computed at the draft's times, in place of its own.
    """
    start, places = jnp.asarray(before.memory.length), drafting.length + 1
    length = start + after.counts - before.counts
    new = retimed(model, memory.part(start, places), plan, drafting.plan)
    blocks = draft.memory.with_part(new, start).blocks
    return dataclasses.replace(
        after,
        memory=dataclasses.replace(memory, length=length),
        draft=dataclasses.replace(memory, blocks=blocks, length=length),
    )

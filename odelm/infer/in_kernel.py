"""Decoding by kernels, which advance the state of `odelm.infer.decode` by some tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from odelm.infer.decode import Decoding
from odelm.infer.sampling import Sampling
from odelm.models.kernels.attend import LEAST
from odelm.models.kernels.decode import Arrays, Begin, Kernels, decode
from odelm.models.kernels.layout import MOST_ROWS, Layout
from odelm.models.memory import KeyValues, Memory

COLDEST = 1e-20
"""The lowest temperature that a kernel draws at."""


def advance_in_kernel(
    tables: tuple[Arrays, Arrays],
    state: Decoding,
    sampling: Sampling,
    until: jax.Array | int,
    *,
    kernels: Kernels,
    end: int,
    persistent: bool = True,
) -> Decoding:
    """Returns the same as `odelm.infer.decode.advance`, for as many rows as the layout has, at most `MOST_ROWS`.

    It takes the likeliest tokens. If the layout is `sampled`, it draws them at the temperature from the whole
    vocabulary, or, if the layout is also `filtered` (one row only), from the `top_k` likeliest; the key must be a
    Threefry key, JAX's default. `kernels` must have the layout for the model, the plan and the memory's room
    (`odelm.models.kernels.layout_choice.layout_of`), and `unsupported` must find nothing in the model. `tables` are the
    model's matrices and vectors (`odelm.models.kernels.tables`). If `persistent`, one launch computes all tokens.
    """
    memory, limit, layout = state.memory, state.tokens.shape[1], kernels.layout
    room, rows = layout.room, len(state.last)
    assert rows == layout.rows <= MOST_ROWS, f"{rows} rows, of which the kernels take {layout.rows}"
    assert not (layout.several and layout.filtered), "top_k with several rows"
    start = jnp.broadcast_to(jnp.asarray(memory.length, jnp.int32), (rows,))
    places = jnp.arange(room)[None]
    real = jnp.pad(memory.real, ((0, 0), (0, room - memory.room)))
    hidden = jnp.where(real | (places >= start[:, None]), 0.0, LEAST)
    kept = jax.new_ref(_flat(memory, "keys", room)), jax.new_ref(_flat(memory, "values", room))
    count = jnp.clip(jnp.asarray(until, jnp.int32), 0, limit) - state.count
    count = jnp.where(state.done.all(), 0, jnp.maximum(count, 0))
    begin = Begin(state.last, state.positions, start, state.done, count, jnp.int32(end))
    matrices, vectors = tables
    given = vectors | {"hidden": hidden} | _drawing(layout, state, sampling)
    tokens, logprobs, made = decode(kernels, matrices, given, kept, begin, limit=limit, persistent=persistent)
    new = jnp.arange(limit) - state.count
    fresh = (new >= 0) & (new < made)

    def placed(old: jax.Array, found: jax.Array) -> jax.Array:
        return jnp.where(fresh[None], found[:, jnp.clip(new, 0, limit - 1)], old)

    last = jnp.where(made > 0, tokens[:, jnp.maximum(made - 1, 0)], state.last)
    behind = places[:, : memory.room] - start[:, None]
    filled = (behind >= 0) & (behind < made)
    after = dataclasses.replace(
        memory, blocks=_folded(memory, *map(jax.freeze, kept)), length=memory.length + made,
        real=memory.real | filled,
    )  # fmt: skip
    return dataclasses.replace(
        state, memory=after, last=jnp.maximum(last, 0), positions=state.positions + made,
        tokens=placed(state.tokens, tokens), logprobs=placed(state.logprobs, logprobs), count=state.count + made,
        done=state.done | ((made > 0) & (last == end)),
    )  # fmt: skip


def _drawing(layout: Layout, state: Decoding, sampling: Sampling) -> Arrays:
    """Returns what `decode` needs to draw tokens: nothing if it takes the likeliest."""
    if not layout.sampled:
        return {}
    numbers = state.count + jnp.arange(state.tokens.shape[1])
    keys = jax.vmap(lambda n: jax.random.key_data(jax.random.fold_in(state.key, n)))(numbers)
    # Scores must stay above the score of a place that is masked out.
    temperature = jnp.maximum(jnp.asarray(sampling.temperature, jnp.float32), COLDEST)
    found = {"temperature": temperature.reshape(1), "keys": keys}
    return found | ({"top_k": jnp.asarray(sampling.top_k, jnp.int32).reshape(1)} if layout.filtered else {})


def _flat(memory: Memory, name: str, room: int) -> jax.Array:
    """Returns the keys or values of all steps of all blocks, (N, B, room, J K)."""
    parts = [getattr(kept, name) for kept in memory.blocks]
    flat = jnp.concatenate([part.reshape(part.shape[0], *part.shape[2:4], -1) for part in parts])
    return jnp.pad(flat, ((0, 0), (0, 0), (0, room - memory.room), (0, 0)))


def _folded(memory: Memory, keys: jax.Array, values: jax.Array) -> tuple[KeyValues, ...]:
    """Returns keys and values (N, B, room, J K) as the blocks of a memory keep them."""
    blocks, first = [], 0
    for kept in memory.blocks:
        shape = kept.keys.shape
        part = [array[first : first + shape[0], :, : memory.room].reshape(shape) for array in (keys, values)]
        blocks.append(KeyValues(*part))
        first += shape[0]
    return tuple(blocks)

"""Attention on TPUs in blocks that stay on the chip: JAX's splash attention, sharded by the mesh that is set.

Neither a matrix of scores nor a mask is ever in memory: causality is built into the order of the blocks, and padding
and packed documents are given by each token's segment number.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from odelm.models.arrays import by_rows_and_heads

LARGEST_BLOCK = 512


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array | None, causal: bool
) -> jax.Array:
    """Returns the attention-weighted mean of the values (B, L, J, K) for each query (B, L, H, K), in their dtype; J
    divides H.

    A token attends to those of its own segment, int32 (B, L); None is one segment. L is a multiple of 128. Off a TPU
    the kernel is interpreted, which is slow but correct.
    """
    if segments is None:
        segments = jnp.zeros(q.shape[:2], jnp.int32)

    def on_device(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        ways = {"tpu": False, "default": True}
        return jax.lax.platform_dependent(
            q, k, v, segments,
            **{name: functools.partial(_attend, causal=causal, interpret=how) for name, how in ways.items()},
        )  # fmt: skip

    return by_rows_and_heads(on_device, q, k, v, segments)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, causal: bool, interpret: bool
) -> jax.Array:
    length, heads, shared = q.shape[1], q.shape[2], k.shape[2]
    block = next(size for size in (LARGEST_BLOCK, LARGEST_BLOCK // 2, 128) if length % size == 0)
    one = (masks.CausalMask if causal else masks.FullMask)((length, length))
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
             "block_q_dq", "block_kv_dq")  # fmt: skip
    # With fewer key-value heads each call takes one of them, with all the queries that share it.
    grouped = shared < heads
    make = kernels.make_splash_mqa if grouped else kernels.make_splash_mha
    kernel = make(
        masks.MultiHeadMask([one] * (heads // shared if grouped else heads)), head_shards=1, q_seq_shards=1,
        block_sizes=kernels.BlockSizes(**dict.fromkeys(names, block)), interpret=interpret,
    )  # fmt: skip

    def of_row(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        q, k, v = (jnp.swapaxes(part, 0, 1) for part in (q, k, v))
        ids = kernels.SegmentIds(segments, segments)
        if not grouped:
            values: Any = kernel(q, k, v, segment_ids=ids)
            return jnp.swapaxes(values, 0, 1)
        groups = q.reshape(shared, heads // shared, *q.shape[1:])
        values = jax.vmap(lambda *parts: kernel(*parts, segment_ids=ids))(groups, k, v)
        return jnp.swapaxes(values.reshape(q.shape), 0, 1)

    scale = jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    return jax.vmap(of_row)(q * scale, k, v, segments).astype(v.dtype)

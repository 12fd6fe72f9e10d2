"""Array operations that all modules share, explicit about shape, dtype and layout instead of relying on JAX's rules.

Models therefore also work where the user has disabled those rules: under `jax_numpy_rank_promotion="raise"`, under
`jax_numpy_dtype_promotion="strict"`, and on a mesh whose axes are `Explicit` (the default of `jax.make_mesh`), where an
operation must state the sharding of its result if its operands do not determine it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from odelm.errors import InputError
from odelm.ode.dtypes import wider


def along_last(vector: jax.Array, ndim: int) -> jax.Array:
    """Returns (D,) with axes of size 1 in front, so that it broadcasts over an array of `ndim` axes."""
    return vector.reshape((1,) * (ndim - vector.ndim) + vector.shape)


def add(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the sum in the wider of the two dtypes, whatever JAX's promotion is set to."""
    wide = wider(a.dtype, b.dtype)
    return a.astype(wide) + b.astype(wide)


def scaled(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    """Returns `factor * x`, multiplied in float32: in 16 bits a factor near 1 would lose what it has learned."""
    return x if factor is None else (x.astype(factor.dtype) * along_last(factor, x.ndim)).astype(x.dtype)


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns `x` rounded to a 16-bit dtype, as it will be written to memory and read back.

    Without this XLA keeps a wider number where it can, and each later reader recomputes it completely: for a norm, its
    sums too.
    """
    if x.dtype == dtype:
        return x
    return jax.lax.optimization_barrier(x.astype(dtype))


def lookup(table: jax.Array, index: jax.Array, *, fill: float = math.nan) -> jax.Array:
    """Returns the rows (.., E) of `table` (V, E) at `index` (..); `fill` where an index is not from 0 to V - 1."""
    spread = _spread(index, 1)
    return table.at[index].get(mode="fill", fill_value=fill, wrap_negative_indices=False, out_sharding=spread)


def pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `x[b, index[b, p]]`, (B, P, D) of (B, L, D) and (B, P): the positions of each row that `index` names."""
    rows = jnp.arange(x.shape[0], dtype=index.dtype)[:, None]
    return x.at[rows, index].get(out_sharding=_spread(index, x.ndim - 2))


def pick_last(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `x[.., index[..]]`, (..) of (.., V) and (..)."""
    places = jnp.indices(index.shape, dtype=index.dtype, sparse=True)
    return x.at[(*places, index)].get(out_sharding=_spread(index, 0))


BATCH_AXES = ("data", "fsdp")
"""The mesh axes that shard the batch, where the mesh has them."""


def constrain(h: jax.Array) -> jax.Array:
    """Returns a state (B, ..), sharded along the batch only, on the mesh that is set, if its axes are Auto.

    Without this the compiler may shard the state like the parameters, and gather it at every product.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_auto or not set(BATCH_AXES) <= set(mesh.axis_names):
        return h
    return jax.lax.with_sharding_constraint(h, PartitionSpec(BATCH_AXES, *(None,) * (h.ndim - 1)))


def batch_parts() -> int:
    """Returns into how many parts the mesh that is set cuts arrays along the batch, 1 without a mesh; inside
    `jax.shard_map` each device's part is not cut further."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return 1
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.axis_names)


def by_rows_and_heads(
    attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> jax.Array:
    """Returns `attend(q, k, v, segments)` for queries (B, L, H, K), keys, values and segments (B, L), sharded so that
    each device of the mesh that is set computes its own rows and heads: the compiler cannot shard a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual or not {*BATCH_AXES, "tensor"} <= set(mesh.axis_names):
        return attend(q, k, v, segments)
    rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, "tensor")
    return jax.shard_map(
        attend, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )(q, k, v, segments)  # fmt: skip


def cuts_evenly(q: jax.Array) -> bool:
    """Returns whether the mesh that is set divides the rows and the heads of (B, L, H, K) evenly, as
    `by_rows_and_heads` requires."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return True
    return q.shape[0] % batch_parts() == 0 and q.shape[2] % mesh.shape.get("tensor", 1) == 0


def is_explicit(x: jax.Array) -> bool:
    """Returns whether an array is on a mesh whose axes are Explicit."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and mesh.are_all_axes_explicit


def check_auto(x: jax.Array, what: str) -> None:
    """Raises InputError for an array on a mesh whose axes are Explicit, where `what` is not supported."""
    if is_explicit(x):
        raise InputError(f"{what} need a mesh whose axes are Auto, not Explicit: jax.make_mesh(axis_types=...)")


def _spread(index: jax.Array, more: int) -> NamedSharding | None:
    """Returns the sharding of a gather at `index` whose result has `more` trailing axes; None where the compiler
    chooses."""
    sharding = jax.typeof(index).sharding
    spec = PartitionSpec(*sharding.spec, *(None,) * more)
    return NamedSharding(sharding.mesh, spec) if is_explicit(index) else None

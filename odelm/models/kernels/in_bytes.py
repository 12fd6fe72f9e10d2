"""Products of int8 matrices with a vector that is not rounded to 8 bits, by the tensor cores' products of int8.

Each number of the vector x becomes three of int8, which are columns of the product (the other five are not used); that
product sums in int32 without rounding:

    x = |x| / UNIT (2^14 x0 + 2^7 x1 + x2 + r),    |r| < 1 each
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.layout import COLUMNS

plgpu: Any = mosaic_gpu
Ref = Any
UNIT = 127 * 2.0**14
"""The length of the vector in the units of its int8 numbers."""
WHOLE, WHOLE_BITS = 1.5 * 2.0**23, 0x4B400000
"""The constant that, added to a float32 number up to 2^22, makes its last bits the nearest whole number, and its
bits."""
BYTES = plgpu.Layout.TILED(Tiling(((COLUMNS, 128), (2, 128), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
"""How a warpgroup holds `COLUMNS` rows of int8 to write them as the tensor core reads them: 8 bytes a thread."""
SHORTEST = 1e-30
"""The least length that is divided by."""


def put_bytes(vector: Ref, inputs: Ref, dtype: Any) -> jax.Array:
    """Rounds a vector (n,) of float32 in shared memory to a dtype, writes it in int8 as the right side of a product,
    (`COLUMNS`, n), and returns its length, float32 (), at least `SHORTEST`."""
    x = vector[...].astype(dtype).astype(jnp.float32)
    vector[...] = x
    length = jnp.maximum(jnp.sqrt(jnp.sum(x * x)), SHORTEST)
    x = plgpu.load(vector, layout=BYTES.reduce(0), optimized=False)
    bits = lax.bitcast_convert_type(x * (UNIT / length) + WHOLE, jnp.int32)
    x = lax.broadcast_in_dim(bits - WHOLE_BITS, inputs.shape, (1,))
    column = plgpu.broadcasted_iota(jnp.int32, inputs.shape, 0, layout=BYTES)
    shift = jnp.where(column == 0, 14, jnp.where(column == 1, 7, 0))
    inputs[...] = ((x >> shift) & jnp.where(column == 0, -1, 127)).astype(jnp.int8)
    return length


def with_columns_added(sums: jax.Array) -> jax.Array:
    """Returns a product (`ROWS`,), float32, in units of the vector's length / `UNIT`, of the sums int32 (`ROWS`,
    `COLUMNS`)."""
    column = plgpu.broadcasted_iota(jnp.int32, sums.shape, 1, layout=plgpu.Layout.WGMMA)
    value = jnp.where(column == 0, 2.0**14, jnp.where(column == 1, 2.0**7, jnp.where(column == 2, 1.0, 0.0)))
    return jnp.sum(sums.astype(jnp.float32) * value, axis=1)

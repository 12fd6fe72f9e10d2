"""Linear maps laid out for one token at a time.

With a single row to multiply, XLA makes a product of a GPU's matrix a sum over its rows or columns. Over the last axis
that is one pass at the speed of memory; over the first it writes all products and reads them again, which takes five
times as long (docs/inference.md). So kernels are turned once, before the loop that uses them for every token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.models import CausalLM


def for_single_rows(model: CausalLM, rows: int) -> CausalLM:
    """Returns a model whose maps are laid out for so many rows: a copy of it where that is one, on a single GPU.

    It computes what `model` computes, up to rounding, for any number of rows.
    """
    if rows != 1 or jax.default_backend() != "gpu" or not jax.sharding.get_abstract_mesh().empty:
        return model
    return with_inputs_last(model)


def with_inputs_last(model: CausalLM) -> CausalLM:
    """Returns a copy whose linear maps inside the blocks keep their kernels with the axes of the inputs last."""
    model = nnx.clone(model)
    for block in [*model.prelude, *model.blocks, *model.coda]:
        for _, module in nnx.iter_modules(block):
            # Only products of a call's tokens: those by which a time is read (odelm.models.modulation) are done.
            if isinstance(module, nnx.Linear | nnx.LinearGeneral) and module.dtype is not None:
                inputs = len(module.axis) if isinstance(module, nnx.LinearGeneral) else 1
                kernel = module.kernel[...]
                turned = jnp.moveaxis(kernel, range(inputs), range(kernel.ndim - inputs, kernel.ndim))
                module.kernel, module.dot_general = nnx.Param(turned), _product
    return model


def _product(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """Returns what `jax.lax.dot_general` gives for a kernel whose first axes were put last."""
    (of_x, of_kernel), batch = dimension_numbers
    first = kernel.ndim - len(of_kernel)
    return jax.lax.dot_general(x, kernel, ((of_x, tuple(first + axis for axis in of_kernel)), batch), **options)

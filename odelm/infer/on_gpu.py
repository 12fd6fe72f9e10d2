"""How a token is computed on a GPU, where launching a kernel costs as much as what it does.

Measured on an H200 (docs/inference.md). Two things pay, and what is computed stays the same, up to rounding:

- With a single row, XLA makes a product with a matrix a sum over its rows or its columns. Over the last axis that is
  one pass at the speed of memory; over the first it writes all products and reads them again. So kernels are turned
  once, before the loop over tokens.
- With several rows the loop over the depth costs more than a step in it, so it is unrolled, for twice the compile time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.models import CausalLM
from odelm.models.transformer import DepthPlan


def ready(model: CausalLM, plan: DepthPlan, rows: int) -> tuple[CausalLM, DepthPlan]:
    """Returns the model and the plan as so many rows are decoded with: what is given, but on a GPU."""
    if jax.default_backend() != "gpu":
        return model, plan
    if rows > 1:
        return model, tuple(dataclasses.replace(part, unroll=True) for part in plan)
    alone = jax.sharding.get_abstract_mesh().empty
    return with_inputs_last(model) if alone else model, plan


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

"""How a model is run on a GPU, where launching a kernel can cost as much as what it does.

Measured on an H200 (docs/inference.md). Results stay the same, up to rounding. Two changes speed up decoding:

- With a single row, XLA computes a matrix product as a sum over the matrix's rows or columns. A sum over the last axis
  is one pass at the speed of memory; for one over the first axis, XLA writes all products and reads them again. So
  kernels are transposed once, before the loop over tokens.
- With several rows the loop over the depth costs more than a step in it, so it is unrolled, at twice the compile time.

When an encoder reads texts:

- The loop over the depth is unrolled too, except where rows leave early: the loop copies the state, and the values that
  a step takes from its time, at every step.
- With many tokens, cuBLAS computes the products and applies the GELU at their end. Triton's kernels, which XLA prefers
  because it times products in isolation, leave the GELU to a separate pass.
- With very many tokens, three products compute queries, keys and values, unless something else is applied to them:
  cuDNN's attention takes them separately, and slicing them out of one result takes longer than one large product saves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx

from odelm.models import CausalLM
from odelm.models.attention import Attention
from odelm.models.transformer import DepthPlan, SharedTransformer

Model = TypeVar("Model", bound=SharedTransformer)
MANY, VERY_MANY = 1024, 4096
"""The least tokens read at once for which cuBLAS's products, and three products, are faster; measured at 128, 1,024 and
16,384."""


def ready(model: CausalLM, plan: DepthPlan, rows: int) -> tuple[CausalLM, DepthPlan]:
    """Returns the model and the plan with which to decode `rows` rows; they are changed only on a GPU."""
    if jax.default_backend() != "gpu":
        return model, plan
    if rows > 1:
        return model, unrolled(plan)
    alone = jax.sharding.get_abstract_mesh().empty
    return with_inputs_last(model) if alone else model, plan


def ready_to_read(model: Model, plan: DepthPlan, tokens: int) -> tuple[Model, DepthPlan]:
    """Returns the model and the plan with which to read `tokens` tokens; they are changed only for an encoder on a
    GPU."""
    if jax.default_backend() != "gpu" or model.config.kind != "encoder":
        return model, plan
    return with_separate_maps(model) if tokens >= VERY_MANY else model, unrolled(plan)


COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
"""Options of a program that reads many tokens: XLA uses no Triton kernels for its matrix products, and does not merge
three products into one. A decoder reads 8 x 1,024 tokens faster with these options too."""


class BySize:
    """A jitted function in which a model reads the tokens in argument number `texts`. For many tokens, the program is
    compiled with `COMPILER_OPTIONS`, except inside another jitted function, where JAX allows no options.

    `options` are passed to `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], *, texts: int, **options: Any):
        self._texts = texts
        self._few: Any = jax.jit(function, **options)
        self._many: Any = jax.jit(function, compiler_options=COMPILER_OPTIONS, **options)

    def __call__(self, *arguments: Any) -> Any:
        tokens = arguments[self._texts]
        alone = not isinstance(tokens, jax.core.Tracer)
        many = alone and jax.default_backend() == "gpu" and tokens.size >= MANY
        return (self._many if many else self._few)(*arguments)

    def _cache_size(self) -> int:
        """Returns how many programs were compiled, as of a jitted function."""
        return self._few._cache_size() + self._many._cache_size()


def unrolled(plan: DepthPlan) -> DepthPlan:
    """Returns the plan without a loop over its steps."""
    return tuple(dataclasses.replace(part, unroll=True) for part in plan)


def with_separate_maps(model: Model) -> Model:
    """Returns a copy that computes queries, keys and values by three products; the model itself if something else is
    applied to them."""
    config = model.config
    if config.qk_norm or config.positions == "rotary" or config.layer_rank or config.wide_modulation:
        return model
    model = nnx.clone(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attention) and type(module.qkv) is nnx.LinearGeneral:
            module.separate = nnx.data(nnx.List(_part(module.qkv, number) for number in range(3)))
    return model


def _part(qkv: nnx.LinearGeneral, number: int) -> nnx.Linear:
    """Returns the map of only queries, keys or values, (D, H K) from (D, 3, H, K): flat, as cuBLAS needs it to add a
    bias."""
    kernel = qkv.kernel[...][:, number]
    kernel, bias = kernel.reshape(len(kernel), -1), qkv.bias
    part = nnx.eval_shape(
        lambda: nnx.Linear(*kernel.shape, use_bias=bias is not None, dtype=qkv.dtype, rngs=nnx.Rngs(0))
    )
    part.kernel = nnx.Param(kernel)
    if bias is not None:
        part.bias = nnx.Param(bias[...][number].reshape(-1))
    return part


def with_inputs_last(model: CausalLM) -> CausalLM:
    """Returns a copy whose linear maps inside the blocks keep their kernels with the axes of the inputs last."""
    model = nnx.clone(model)
    for block in [*model.prelude, *model.blocks, *model.coda]:
        for _, module in nnx.iter_modules(block):
            # Only maps applied to a call's tokens: those that read a time (odelm.models.modulation) are already
            # computed.
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

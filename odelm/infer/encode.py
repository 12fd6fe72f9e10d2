"""A model made ready to run: parameters in the dtype of the arithmetic, all that depends on time precomputed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from odelm import ode
from odelm.models import CausalLM, MaskedLM
from odelm.models.precision import compute_dtype
from odelm.models.transformer import DepthPlan


@dataclass(frozen=True)
class Runner:
    """A model split once into structure and parameters, for pure functions of the latter."""

    model: CausalLM | MaskedLM
    graph: nnx.GraphDef
    params: Any

    @classmethod
    def of(cls, model: CausalLM | MaskedLM) -> "Runner":
        graph, params = nnx.split(model, nnx.Param)
        params = cast_matrices(params, compute_dtype(model.config))
        return cls(nnx.merge(graph, params), graph, params)

    def plan(self, steps: int, solver: ode.Solver) -> DepthPlan:
        """Returns the precomputed part of an integration in `steps` equal steps."""
        return self.model.plan(steps=steps, solver=solver)


def cast_matrices(params: Any, dtype: jnp.dtype) -> Any:
    """Returns the parameters with the matrices of matrix products in `dtype`, so that no call has to cast them.

    Norms, biases and the modulation by time stay float32.
    """

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [getattr(key, "key", None) for key in path]
        product = "tokens" in names or ("kernel" in names and "modulation" not in names)
        return leaf.astype(dtype) if product else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def make_forward(graph: nnx.GraphDef) -> Callable[[Any, DepthPlan, jax.Array], jax.Array]:
    """Returns the jitted `forward(params, plan, tokens) -> logits`, float32 (B, L, V); compiled once a step count."""

    @jax.jit
    def forward(params: Any, plan: DepthPlan, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens, plan=plan)

    return forward


def make_adaptive(
    graph: nnx.GraphDef, *, tolerance: float, solver: ode.Solver
) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns the jitted `forward(params, tokens) -> (logits, evaluations)` with steps chosen by tolerance."""

    @jax.jit
    def forward(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        hidden, evaluations = model.encode_adaptive(tokens, tolerance=tolerance, solver=solver)
        return model.readout(hidden), evaluations

    return forward

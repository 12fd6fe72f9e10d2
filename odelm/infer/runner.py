"""Prepares a model to run: parameters in the dtype of the arithmetic, and all that depends only on time precomputed."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import jax
from flax import nnx

from odelm import ode
from odelm.errors import InputError
from odelm.infer import on_gpu
from odelm.models import CausalLM, Classifier, Encoder, MaskedLM
from odelm.models.embed import Readout
from odelm.models.parameters import abstract_like, parameters, with_parameters
from odelm.models.transformer import DepthPlan, SharedTransformer

Model = TypeVar("Model", bound=SharedTransformer)


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Structure(nnx.GraphDef):
    """The structure of a model, hashed once. Jitted functions take it as a static argument, and hash it in each call:
    for a Flax graph this takes 300 us, longer than a GPU takes to read a prompt."""

    _hash: int

    @classmethod
    def of(cls, graph: nnx.GraphDef) -> "Structure":
        return cls(graph.nodes, graph.attributes, graph.num_leaves, hash(graph))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Structure) or (self._hash, self.num_leaves) != (other._hash, other.num_leaves):
            return False
        return self.nodes == other.nodes and self.attributes == other.attributes


@dataclass(frozen=True)
class Runner:
    """A model split once into structure and parameters, so that jitted functions take the parameters as an argument."""

    model: CausalLM | MaskedLM | Classifier | Encoder
    graph: Structure
    params: Any
    """Nested dicts, which JAX flattens faster than Flax's state."""
    _plans: dict[tuple[Any, ...], DepthPlan] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: CausalLM | MaskedLM | Classifier | Encoder) -> "Runner":
        model = in_compute_dtypes(model)
        graph, params = nnx.split(model, nnx.Param)
        return cls(model, Structure.of(graph), nnx.to_pure_dict(params))

    def plan(
        self, steps: int, solver: str, integrator: str = "scan", grid: tuple[float, ...] | None = None
    ) -> DepthPlan:
        """Returns the precomputed part of an integration in `steps` equal steps, or over a grid, computed once."""
        name = (steps if grid is None else grid, solver, integrator)
        if name not in self._plans:
            equal = steps if grid is None else None
            self._plans[name] = _plan(self.graph, equal, grid, solver, integrator, self.params)
        return self._plans[name]


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _plan(
    graph: nnx.GraphDef, steps: int | None, grid: tuple[float, ...] | None, solver: str, integrator: str, params: Any
) -> DepthPlan:
    """Returns the plan, computed by one program: without it, each operation is compiled separately, half a second a
    plan."""
    return nnx.merge(graph, params).plan(steps=steps, grid=grid, solver=solver, integrator=integrator)


def in_compute_dtypes(model: Model) -> Model:
    """Returns a copy whose matrices have the dtypes that its modules compute in, so that no call has to cast them.

    The copy computes the same as the model, bit for bit: a linear map is cast as its own call would cast it, and a tied
    readout gets a matrix of its own, while the embedding that is looked up stays float32. Norms and the modulation by
    time stay float32 too. The matrices of a quantised model stay as they are.
    """
    model = nnx.clone(model)
    if model.quantization is not None:
        return model
    for module in [module for _, module in nnx.iter_modules(model)]:
        if isinstance(module, nnx.Linear | nnx.LinearGeneral) and module.dtype is not None:
            for name in ("kernel", "bias"):
                _cast(module, name, module.dtype)
        elif isinstance(module, Readout) and module.dtype.itemsize < 4:
            if not hasattr(module, "tokens"):
                module.tokens = nnx.Param(model.embed.tokens[...])
            _cast(module, "tokens", module.dtype)
    return model


def with_dtype(model: Model, dtype: str, **options: Any) -> Model:
    """Returns the model with its matrix products, and the state that is integrated, in another dtype, and with other
    `options` as in `with_options`."""
    return with_options(model, dtype=dtype, **options)


def with_options(model: Model, **options: Any) -> Model:
    """Returns the model with other options of its config that leave its parameters unchanged; None keeps an option.

    Another `dtype` applies to the state too. Raises InputError for a quantised model.
    """
    options = {name: value for name, value in options.items() if value not in (None, getattr(model.config, name))}
    if not options:
        return model
    if model.quantization is not None:
        names = " and ".join(options)
        raise InputError(f"the model is quantised, as {model.quantization}: choose its {names} before it is quantised")
    if "dtype" in options:
        options["residual_dtype"] = "auto"
    config = dataclasses.replace(model.config, **options).validate()
    made = abstract_like(model, config)
    # `in_compute_dtypes` may have given the model a readout of its own.
    head, its = getattr(model, "head", None), getattr(made, "head", None)
    if isinstance(head, Readout) and isinstance(its, Readout) and hasattr(head, "tokens"):
        its.tokens = head.tokens
    return with_parameters(made, parameters(model))


def _cast(module: nnx.Module, name: str, dtype: Any) -> None:
    param = getattr(module, name)
    if param is not None:
        setattr(module, name, nnx.Param(param[...].astype(dtype)))


def make_forward(graph: nnx.GraphDef) -> Callable[[Any, DepthPlan, jax.Array], jax.Array]:
    """Returns the jitted `forward(params, plan, tokens) -> logits`, float32 (B, L, V); compiled once for each step
    count."""

    def forward(params: Any, plan: DepthPlan, tokens: jax.Array) -> jax.Array:
        model, ready = on_gpu.ready_to_read(nnx.merge(graph, params), plan, tokens.size)
        return model(tokens, plan=ready)

    return on_gpu.BySize(forward, texts=2)


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

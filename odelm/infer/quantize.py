"""Quantised models: 8-bit matrices, and optionally 8-bit inputs to them; see docs/inference.md.

Symmetric integers with a scale for each output of a matrix (Jacob et al. 2018, arXiv 1712.05877; Wu et al. 2020, arXiv
2004.09602), or the float of 8 bits E4M3 (Micikevicius et al. 2022, arXiv 2209.05433). A shared matrix is quantised once
for all depths. Its inputs change along the depth, so calibrated scales must hold at every time: this part is our own.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from odelm.errors import InputError, nearest
from odelm.infer.quantized import KINDS, Kind, QuantizedEmbed, QuantizedLinear, QuantizedReadout, rounded, scale_of
from odelm.infer.runner import check_model
from odelm.models import CausalLM, MaskedLM
from odelm.models.inputs import Array, Inputs
from odelm.models.parameters import like, parameters, with_parameters
from odelm.models.ranges import input_ranges
from odelm.models.transformer import DepthPlan, SharedTransformer
from odelm.ode import Plan

Model = TypeVar("Model", bound=SharedTransformer)


def quantize(
    model: Model,
    kind: str,
    *,
    calibration: Iterable[Array | Inputs] | None = None,
    plan: DepthPlan | Sequence[DepthPlan] | None = None,
) -> Model:
    """Returns a copy of a model with 8-bit matrices, which is used like the model, but not trained or saved.

    All linear maps of the blocks and heads are quantised, each with a float32 scale for each of its outputs. An
    embedding that is also the readout's matrix is quantised too; its rows are looked up and multiplied by their scales.
    Other embeddings, norms, biases and corrections of low rank stay as they are, and memories of keys and values keep
    their dtype.

    Args:
        kind: what has 8 bits.

            - "int8", "fp8": the matrices. They are converted where they are used, and products are in the dtype of the
              model. fp8 is float8_e4m3fn.
            - "int8_dynamic", "fp8_dynamic": their inputs too, with a scale for each token, computed at run time.
              Products are of 8 bits, summed in int32 or float32. Maps that a model computes in float32 whatever its
              dtype keep float inputs: the modulation by time, which a plan computes once, the projection of a
              factorised embedding, and heads that read a single position.
            - "int8_static", "fp8_static": the same, with one calibrated scale for all inputs of a matrix: the largest
              input of the calibration becomes the largest value, and larger inputs are clipped.
        calibration: for a static kind, batches of text as the model will read: tokens int32 (B, L), or `Inputs`. All
            their positions count, padding too.
        plan: for a static kind, one plan of the model or several (`model.plan`), by which the calibration crosses the
            depth: the scale of a shared matrix holds for all plans, at all their times and stages. Full depth by
            default; a coarse plan visits other states, so give the plans that will be used.

    The copy has no `profile`, because a profile holds only for the original parameters. Raises InputError for an
    unknown kind, for a model that is quantised already, and for calibration that is missing, empty, not finite, or not
    used by the kind.
    """
    check_model(model)
    chosen = kind_of(kind)
    if model.quantization is not None:
        raise InputError(f"the model is quantised already, as {model.quantization}: quantise the one that it was")
    if chosen.inputs != "static" and (calibration is not None or plan is not None):
        raise InputError(f"{kind!r} takes no calibration and no plan; '{chosen.name.split('_')[0]}_static' does")
    largest = _calibrated(model, chosen, calibration, plan) if chosen.inputs == "static" else {}
    abstract = nnx.eval_shape(lambda: _replaced(like(model, model.config, rngs=nnx.Rngs(0)), chosen))
    made = with_parameters(abstract, _arrays(model, abstract, chosen, largest))
    made.quantization = kind
    return made


def kind_of(name: str) -> Kind:
    """Returns the kind of a name; InputError for an unknown one."""
    if name not in KINDS:
        raise InputError(f"quantisation is {name!r}; {nearest(name, tuple(KINDS))}")
    return KINDS[name]


def _replaced(model: Model, kind: Kind) -> Model:
    """Returns the model with quantised modules, of the kind, in place of those with matrices."""
    if isinstance(model, CausalLM | MaskedLM):
        if model.config.tie_readout:
            model.embed = QuantizedEmbed(model.config, kind, rngs=nnx.Rngs(0))
        model.head = QuantizedReadout(model.config, kind, rngs=nnx.Rngs(0))
    for module in [module for _, module in nnx.iter_modules(model)]:
        for name, child in list(vars(module).items()):
            if isinstance(child, nnx.Linear | nnx.LinearGeneral):
                setattr(module, name, QuantizedLinear(child, kind))
    return model


def _arrays(model: SharedTransformer, abstract: SharedTransformer, kind: Kind, largest: dict[str, Any]) -> dict:
    """Returns the parameters of the quantised model by name, given its shapes and the matrices' largest inputs."""
    own, shapes, arrays = parameters(model), parameters(abstract), {}
    for path, module in nnx.iter_modules(abstract):
        name = "/".join(map(str, path))
        if isinstance(module, QuantizedLinear):
            values, scale = _quantized(own[f"{name}/kernel"], tuple(range(module.inputs)), kind)
            arrays |= {f"{name}/kernel": values, f"{name}/scale": scale}
        elif isinstance(module, QuantizedReadout):
            place = "embed" if model.config.tie_readout else name
            values, scale = _quantized(own[f"{place}/tokens"], (1,), kind)
            arrays |= {f"{place}/tokens": values, f"{place}/scale": scale, f"{name}/scale": scale}
        if f"{name}/input_scale" in shapes:
            arrays[f"{name}/input_scale"] = jnp.float32(largest[name] / kind.largest)
    return {name: arrays.get(name, own.get(name)) for name in shapes}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantized(matrix: jax.Array, axes: tuple[int, ...], kind: Kind) -> tuple[jax.Array, jax.Array]:
    """Returns a matrix in 8 bits, and its scales, which have the axes that are not in `axes`."""
    scale = scale_of(matrix, axes, kind)
    return rounded(matrix, scale, kind), scale.squeeze(axes)


def _calibrated(
    model: SharedTransformer,
    kind: Kind,
    calibration: Iterable[Array | Inputs] | None,
    plan: DepthPlan | Sequence[DepthPlan] | None,
) -> dict[str, float]:
    """Returns the largest input of each matrix over all batches, plans and times."""
    if calibration is None:
        raise InputError(f"{kind.name!r} needs calibration: batches of tokens such as the model will read")
    plans = [model.plan()] if plan is None else _as_plans(plan)
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    def measure(params: Any, inputs: Inputs, plan: DepthPlan) -> dict[str, jax.Array]:
        ranges = input_ranges(nnx.merge(graph, params), inputs, plan)
        return {name: range.max() for name, range in ranges.items()}

    found: dict[str, float] = {}
    for batch in calibration:
        inputs = batch if isinstance(batch, Inputs) else Inputs(batch)
        for one in plans:
            ranges = jax.device_get(measure(params, inputs.checked(model.config), one))
            # The maximum is NaN if either of the two is.
            found = {name: float(np.maximum(range, found.get(name, 0.0))) for name, range in ranges.items()}
    if not found:
        raise InputError("calibration has no batches, expected at least one, int32 (batch, length)")
    wrong = next((name for name, range in found.items() if not np.isfinite(range)), None)
    if wrong is not None:
        raise InputError(f"the inputs of {wrong} are not finite in the calibration: use other text, or another dtype")
    # A matrix whose inputs were all zero gets the scale 1.
    return {name: range or kind.largest for name, range in found.items()}


def _as_plans(plan: DepthPlan | Sequence[DepthPlan]) -> list[DepthPlan]:
    """Returns a list of plans, given one or several; a plan is itself a tuple, with an `odelm.ode.Plan` for each
    block."""
    if not plan:
        raise InputError("plan is empty, expected the result of model.plan(...), or several of them")
    return [cast(DepthPlan, plan)] if isinstance(plan[0], Plan) else list(cast(Sequence[DepthPlan], plan))

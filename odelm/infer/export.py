"""The forward pass as a `jax.export` artifact, which a process can call with only JAX installed; see docs/inference.md.

An artifact holds the parameters and all values that depend only on time, for one way to cross the depth. It takes any
batch size, and any length that the model takes:

    forward = jax.export.deserialize(path.read_bytes())
    logits = forward.call(tokens)        # of an encoder: forward.call(tokens, mask)

Source: https://docs.jax.dev/en/latest/export/export.html, which also says how long an artifact stays readable.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import export

from odelm import ode
from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.files import fingerprint
from odelm.infer.runner import Runner, with_dtype
from odelm.models import CausalLM, Classifier, MaskedLM
from odelm.models.transformer import DepthPlan, Grid

SUFFIX = ".jaxexport"
PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 2**31 - 2**20
"""The most bytes of a program that fit into the format that `jax.export` writes (FlatBuffers), whose offsets have 31
bits."""


class Artifact(NamedTuple):
    """A file that holds a forward pass."""

    name: str
    data: bytes
    about: dict[str, Any]
    """How the depth is crossed, and the inputs and outputs, as JSON values."""


def forward_artifacts(
    model: CausalLM | MaskedLM | Classifier,
    *,
    steps: Sequence[int] = (),
    grids: Sequence[Grid] = (),
    solver: ode.Solver = "euler",
    integrator: str = "scan",
    dtype: str = "auto",
) -> Iterator[Artifact]:
    """Returns an artifact for each step count and for each grid; each is made when the iterator reaches it.

    The arguments of an artifact are `tokens`, int32 (batch, length), and for an encoder `mask`, bool (batch, length),
    True at real tokens; its result is float32 logits (batch, length, vocabulary), or (batch, outputs) for a classifier.
    A token without an embedding makes logits of its row NaN. Token types are 0, except that a classifier with token
    types takes `token_types`, int32 (batch, length), as a third argument.

    Args:
        steps, grids, solver: as in `model.plan`.
        integrator: "scan" is the only one that can be exported.
        dtype: of matrix products; "auto" is float32 on every machine.

    Raises InputError at once for a quantised model, and for steps, a grid or a solver that the model cannot take or
    that cannot be exported. Raises it while an artifact is made if that is larger than `jax.export` can write.
    """
    if model.quantization is not None:
        raise InputError(f"the model is quantised, as {model.quantization}: export the one that it was made from")
    name = solver if isinstance(solver, str) else type(solver).__name__
    if integrator != "scan" or name in ode.IMPLICIT_SOLVERS:
        raise InputError(
            f"solver {name!r} with integrator {integrator!r} cannot be exported: Diffrax's integration calls back into "
            f"Python; give the integrator 'scan' and one of {', '.join(ode.SOLVERS)}"
        )
    runner = Runner.of(_for_export(model, dtype))
    ways: list[tuple[int | None, Grid | None]] = [(count, None) for count in dict.fromkeys(steps)]
    ways += [(None, grid) for grid in grids]
    plans = [runner.model.plan(steps=count, grid=grid, solver=solver) for count, grid in ways]
    return (_artifact(runner, plan, *way, name) for plan, way in zip(plans, ways, strict=True))


def _for_export(model: CausalLM | MaskedLM | Classifier, dtype: str) -> CausalLM | MaskedLM | Classifier:
    """Returns the model with an attention that every platform supports, and with the dtype to compute in."""
    return with_dtype(model, "float32" if dtype == "auto" else dtype, attention="xla")


def _artifact(runner: Runner, plan: DepthPlan, steps: int | None, grid: Grid | None, solver: str) -> Artifact:
    config = runner.model.config
    exported = _exported(runner, plan)
    size = len(exported.mlir_module_serialized)
    if size > LARGEST:
        raise InputError(
            f"the forward pass has {size:,} bytes with its parameters, but jax.export writes at most {LARGEST:,}: give "
            "--dtype=bfloat16, which halves its blocks, or write a bundle without it (odelm.bundle.write)"
        )
    times = None if grid is None else [float(t) for t in np.asarray(grid)]
    name = f"forward_{steps}_steps" if times is None else f"forward_{len(times) - 1}_steps_{fingerprint(times)}"
    about = {
        "steps": steps,
        "grid": times,
        "solver": solver,
        "evaluations": sum(part.evaluations for part in plan),
        "dtype": config.dtype,
        "arguments": [f"{name} {dtype.__name__} (batch, length)" for name, dtype in _arguments(config).items()],
        "result": f"logits float32 (batch, {config.outputs or f'length, {config.vocab_size}'})",
        "max_length": config.max_length,
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
    }
    return Artifact(name + ("" if solver == "euler" else f"_{solver}") + SUFFIX, bytes(exported.serialize()), about)


def _exported(runner: Runner, plan: DepthPlan) -> export.Exported:
    """Returns the forward pass, lowered for every platform that it supports, for batches and lengths of any size."""
    config = runner.model.config

    @jax.jit
    def forward(tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None) -> jax.Array:
        return nnx.merge(runner.graph, runner.params)(tokens, mask=mask, token_types=token_types, plan=plan)

    shape = export.symbolic_shape("batch, length", constraints=[f"length <= {config.max_length}"])
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for dtype in _arguments(config).values()]
    platforms = PLATFORMS
    if config.dtype == "float16" and jax.default_backend() != "cpu":
        # On a CPU some products of float16 are computed in float32, which is decided where the function is traced.
        platforms = tuple(name for name in PLATFORMS if name != "cpu")
    try:
        return export.export(forward, platforms=platforms)(*arguments)
    except Exception:
        # An error that is not due to another platform is raised again here.
        return export.export(forward)(*arguments)


def _arguments(config: ModelConfig) -> dict[str, type]:
    """Returns the dtype of each argument (batch, length) by its name, in their order."""
    arguments: dict[str, type] = {"tokens": np.int32}
    if config.kind == "encoder":
        arguments["mask"] = bool
    if config.outputs and config.token_types > 1:
        arguments["token_types"] = np.int32
    return arguments

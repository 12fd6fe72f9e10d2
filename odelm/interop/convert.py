"""Converts between models that share their blocks and models that do not.

`unrolled` gives every unit of depth a block of its own, with everything in the shared block that depends on time folded
into the weights: the same function at unit steps. `shared` goes the other way, from an ordinary stack to a few shared
blocks, and is only a starting point for further training (Bae et al. 2024, "Relaxed Recursive Transformers", arXiv
2410.20672, section 2.2 and 2.3).
"""

import dataclasses
import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from odelm.config import InitConfig, ModelConfig
from odelm.errors import InputError
from odelm.models import BlockChain, SharedBlock
from odelm.models.block import Condition
from odelm.models.norm import Affine
from odelm.models.parameters import abstract_like, like, load_parameters, parameters, with_parameters
from odelm.models.residual import Delta
from odelm.models.transformer import SharedTransformer

Model = TypeVar("Model", bound=SharedTransformer)
Arrays = dict[str, Any]

ROUNDING = 1e-6
"""Float32 matrices with entries of order 0.1 count as equal if the singular values of their difference are below
this."""

BLOCKS = ("prelude/", "blocks/", "coda/")
"""Prefixes of the names of blocks' parameters."""

MATRICES = {
    "attention/qkv": "qkv",
    "attention/query": "query",
    "attention/key_value": "key_value",
    "attention/out": "out",
    "feedforward/up": "up",
    "feedforward/down": "down",
}
"""The linear maps of a block, and the names of their residuals in `odelm.models.residual`."""


def unrolled(model: Model) -> Model:
    """Returns a model with a block for each unit of depth, equal to this one at unit steps.

    Time modulation and residuals are folded into the weights, in float32. Raises InputError for a model of several
    lanes, and for one that shares keys and values over time.
    """
    if model.config.lanes > 1:
        raise InputError(f"model.lanes is {model.config.lanes}, but separate layers have one state: expected 1")
    if model.config.kv_span > 1:
        raise InputError(
            f"model.kv_span is {model.config.kv_span}, but separate layers each have keys and values: expected 1"
        )
    config = dataclasses.replace(
        model.config,
        prelude=0,
        coda=0,
        groups=model.config.depth,
        time_modulation=False,
        wide_modulation=False,
        layer_rank=0,
        reference_depth=None,
        # Modulation shifts a state whose norms have no bias of their own.
        bias=model.config.bias or model.config.time_modulation,
    )
    arrays = {}
    for unit in range(config.depth):
        block, t = _layer(model, unit)
        for inner, part in _parts(block):
            arrays |= {f"blocks/{unit}/{inner}{name}": array for name, array in _at_time(part, t).items()}
    rest = {name: array for name, array in parameters(model).items() if not name.startswith(BLOCKS)}
    result = abstract_like(model, config)
    return with_parameters(result, _zero_biases(result) | rest | arrays)


def flattened(model: Model) -> Model:
    """Returns an unshared model with its inner blocks as units of depth of their own."""
    inner = model.config.inner_blocks
    depth = model.config.depth * inner
    config = dataclasses.replace(model.config, depth=depth, groups=depth, inner_blocks=1)

    def renamed(name: str) -> str:
        parts = name.split("/")
        if inner == 1 or parts[0] != "blocks":
            return name
        return "/".join(["blocks", str(int(parts[1]) * inner + int(parts[3])), *parts[4:]])

    return with_parameters(abstract_like(model, config), {renamed(n): array for n, array in parameters(model).items()})


def shared(model: Model, init: InitConfig, *, rngs: nnx.Rngs) -> Model:
    """Returns a model of `init.groups` blocks, each made of the layers of its stretch of depth as `init.merge` says.

    The first `init.prelude` and the last `init.coda` layers stay as they are. Raises InputError if the layers between
    do not divide over the groups, or `init.layer` is no layer of a stretch.
    """
    ends = model.config.prelude, model.config.coda
    options = model.config
    if options.time_modulation or options.layer_rank or options.reference_depth is not None or options.lanes > 1:
        model = unrolled(model)
    config = _shared_config(model.config, init, ends)
    given, size = parameters(model), config.core // config.groups
    if not -size <= init.layer < size:
        raise InputError(f"init.layer is {init.layer}, but a group has {size} layers: expected {-size} to {size - 1}")
    result = like(model, config, rngs=rngs)
    new, sources = parameters(result), [_layer_name(model.config, unit) for unit in range(config.depth)]
    arrays: Arrays = {name: array for name, array in given.items() if not name.startswith(BLOCKS)}
    names = [name.removeprefix("blocks/0/") for name in given if name.startswith("blocks/0/")]
    for unit in (*range(config.prelude), *range(config.depth - config.coda, config.depth)):
        arrays |= {f"{_layer_name(config, unit)}/{name}": given[f"{sources[unit]}/{name}"] for name in names}
    for group in range(config.groups):
        stretch = sources[config.prelude + group * size :][:size]
        for name in names:
            layers = np.stack([np.asarray(given[f"{source}/{name}"]) for source in stretch])
            merged = layers[init.layer] if init.merge == "layer" else layers.mean(0)
            arrays[f"blocks/{group}/{name}"] = merged
            for key, array in _residual(name, layers - merged, config.layer_rank).items() if config.layer_rank else ():
                key = f"blocks/{group}/{key}"
                arrays[key] = _alive(array, new[key]) if key.endswith("/down") else array
    return load_parameters(result, arrays)


def summary(before: ModelConfig, after: SharedTransformer, init: InitConfig) -> str:
    """Returns one sentence on what was shared."""
    layers = after.config.core // after.config.groups
    how = {
        "mean": f"the mean of {layers} layers",
        "layer": f"layer {init.layer % layers} of {layers}",
        "low_rank": f"the mean of {layers} layers, and a residual of rank {init.rank} for each as a function of time",
    }[init.merge]
    size = sum(array.size for array in parameters(after).values())
    ends = f", between {after.config.prelude} and {after.config.coda} of their own" if after.config.ends else ""
    had = before.groups + before.ends
    return f"shared {had} blocks as {after.config.groups}{ends}: each is {how}; {size / 1e6:.2f} M parameters"


def _shared_config(model: ModelConfig, init: InitConfig, ends: tuple[int, int]) -> ModelConfig:
    """Returns the config after sharing; `ends` are the model's own prelude and coda, kept unless `init` sets others."""
    prelude = ends[0] if init.prelude is None else init.prelude
    coda = ends[1] if init.coda is None else init.coda
    groups = model.groups if init.groups is None else init.groups
    rank = init.rank if init.merge == "low_rank" else 0
    had = len({_layer_name(model, unit) for unit in range(prelude, model.depth - coda)})
    if 0 < had < groups:
        raise InputError(f"init.groups is {groups}, but the model has only {had} groups of layers to share")
    return dataclasses.replace(model, prelude=prelude, coda=coda, groups=groups, layer_rank=rank).validate()


def _layer_name(config: ModelConfig, unit: int) -> str:
    """Returns the name of the block that a unit of depth applies."""
    if unit < config.prelude:
        return f"prelude/{unit}"
    if unit >= config.depth - config.coda:
        return f"coda/{unit - config.depth + config.coda}"
    return f"blocks/{(unit - config.prelude) * config.groups // config.core}"


def _layer(model: SharedTransformer, unit: int) -> tuple[SharedBlock | BlockChain, float]:
    """Returns the block that a unit of depth applies, and the block's time there."""
    part, index = _layer_name(model.config, unit).split("/")
    core = part == "blocks"
    return getattr(model, part)[int(index)], float(unit - model.config.prelude) if core else 0.0


def _zero_biases(model: SharedTransformer) -> Arrays:
    return {name: jnp.zeros(leaf.shape) for name, leaf in parameters(model).items() if name.endswith("/bias")}


def _parts(block: SharedBlock | BlockChain) -> list[tuple[str, SharedBlock]]:
    if isinstance(block, BlockChain):
        return [(f"inner/{i}/", part) for i, part in enumerate(block.inner)]
    return [("", block)]


def _at_time(block: SharedBlock, t: float) -> Arrays:
    """Returns the parameters of a plain block that does what this one does at time `t`."""
    condition = block.condition(jnp.float32(t))
    own = parameters(block)
    arrays = {name: array for name, array in own.items() if name.split("/")[0] in ("attention", "feedforward")}
    if condition.delta is not None:
        delta = condition.delta
        deltas = delta.inputs | {"out": delta.out, "up": delta.up, "down": delta.down}
        for name, key in MATRICES.items():
            if key in deltas:
                arrays |= _with_delta(arrays, name, deltas[key])
    if condition.scales is not None:
        for name in set(condition.scales) - {"hidden"}:
            arrays |= _gated(arrays, f"attention/{name}", condition.scales[name])
        hidden = condition.scales["hidden"]
        arrays["feedforward/down/kernel"] = arrays["feedforward/down/kernel"] * hidden[:, None]
    arrays |= _gated(arrays, "attention/out", condition.gate1) | _gated(arrays, "feedforward/down", condition.gate2)
    return arrays | _norms(condition)


def _norms(condition: Condition) -> Arrays:
    def of(name: str, affine: Affine | None) -> Arrays:
        if affine is None:
            return {}
        return {f"{name}/scale": affine.scale} | ({} if affine.shift is None else {f"{name}/bias": affine.shift})

    return of("norm1", condition.norm1) | of("norm2", condition.norm2)


def _with_delta(arrays: Arrays, name: str, delta: Delta) -> Arrays:
    kernel = arrays[f"{name}/kernel"]
    found = {f"{name}/kernel": kernel + (delta.down @ delta.up).reshape(kernel.shape)}
    if delta.bias is not None:
        bias = arrays[f"{name}/bias"]
        found[f"{name}/bias"] = bias + delta.bias.reshape(bias.shape)
    return found


def _gated(arrays: Arrays, name: str, gate: jax.Array | None) -> Arrays:
    if gate is None:
        return {}
    names = [key for key in (f"{name}/kernel", f"{name}/bias") if key in arrays]
    return {key: arrays[key] * np.broadcast_to(gate, arrays[key].shape) for key in names}


def _residual(name: str, layers: np.ndarray, rank: int) -> Arrays:
    """Returns the residual's parameters: how each layer (n, ..) of one parameter differs from the shared one."""
    found = re.fullmatch(r"(inner/\d+/)?(.+)/(kernel|bias|scale)", name)
    assert found is not None, name
    inner, part, kind = found[1] or "", found[2], found[3]
    if part in ("norm1", "norm2"):
        return {f"{inner}residual/{part}/{kind}": layers}
    if part not in MATRICES:
        return {}
    place = f"{inner}residual/{MATRICES[part]}"
    if kind == "bias":
        return {f"{place}/bias": layers.reshape(len(layers), -1)}
    inputs = int(np.prod(layers.shape[1:3])) if part == "attention/out" else layers.shape[1]
    down, up = low_rank(layers.reshape(len(layers), inputs, -1), rank)
    return {f"{place}/down": down, f"{place}/up": up}


def _alive(down: np.ndarray, new: jax.Array) -> np.ndarray:
    """Returns the first factors, newly drawn where they are zero: if both factors were zero, neither would ever
    learn."""
    return np.where(down.any(axis=1, keepdims=True), down, new)


def low_rank(matrices: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors (n, I, rank) and (n, rank, O) whose products are nearest to the matrices (n, I, O).

    The singular values are shared out evenly; those that are only rounding, and a rank beyond the matrices' own, give
    zeros.
    """
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    kept = min(rank, values.shape[1])
    root = np.sqrt(np.where(values > ROUNDING, values, 0.0)[:, :kept])
    down, up = left[:, :, :kept] * root[:, None, :], root[:, :, None] * right[:, :kept]
    return np.pad(down, ((0, 0), (0, 0), (0, rank - kept))), np.pad(up, ((0, 0), (0, rank - kept), (0, 0)))

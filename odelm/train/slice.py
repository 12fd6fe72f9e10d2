"""What a recipe would need of a slice of TPUs: the real update compiled for the slice, on a machine without TPUs.

`libtpu` (the extra `slice`) compiles for a topology by its name. The figures of a chip are those that Google publishes
(cloud.google.com/tpu/docs/v5e, v5p and v6e).
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from odelm import sharding
from odelm.config import Config, DataConfig, ModelConfig
from odelm.errors import InputError
from odelm.models.attention import splash_pays
from odelm.train.optimizer import make_optimizer
from odelm.train.step import abstract_state, graph_of, jit_update, make_update


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip."""

    flops: float
    """Operations a second in bfloat16."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second from memory."""
    links: float
    """Bytes a second to its neighbours, all links together."""


CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9),
    "v6e": Chip(918e12, 32e9, 1640e9, 448e9),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "f64": 8, "s64": 8, "u64": 8}


@dataclass(frozen=True)
class Need:
    """What one update of so many depth steps needs of each chip."""

    steps: int
    memory: int
    """Bytes: parameters, optimiser state, batch, and what is held beside them."""
    flops: float
    traffic: float
    """Bytes to and from the chip's memory."""
    collectives: dict[str, int] | None
    """Bytes that come out of each kind of collective."""

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Returns the least time of each part by the chip's figures."""
        sent = sum((self.collectives or {}).values()) / chip.links
        return {"compute": self.flops / chip.flops, "memory": self.traffic / chip.bandwidth, "links": sent}


def needs(config: Config, topology: str) -> Iterator[Need]:
    """Yields what a slice such as "v5e:4x4" needs for the update at each count of steps.

    Raises InputError for an unknown chip, where libtpu is missing, for a recipe of a task, and for a mesh or a batch
    that does not fit.
    """
    for count, compiled in compiled_updates(config, topology):
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        assert memory is not None and isinstance(cost, dict)
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        yield Need(
            steps=count,
            memory=held - memory.alias_size_in_bytes,
            flops=float(cost["flops"]),
            traffic=float(cost["bytes accessed"]),
            collectives=sent_by(compiled),
        )


def compiled_updates(config: Config, topology: str) -> Iterator[tuple[int, jax.stages.Compiled]]:
    """Yields each count of steps of a recipe, and its update compiled for a slice; raises as `needs` does."""
    model = _as_on_tpu(config.model, config.train.length)
    for count, lowered in lowered_updates(dataclasses.replace(config, model=model), _devices(topology)):
        yield count, lowered.compile()


def lowered_updates(config: Config, devices: Sequence[Any]) -> Iterator[tuple[int, jax.stages.Lowered]]:
    """Yields each count of steps of a recipe, and its update lowered for devices that need not be present.

    Raises InputError for a recipe of a task, whose examples have lengths that only its files know.
    """
    if config.data.task or config.model.outputs:
        raise InputError(
            f"data.task is {config.data.task!r} and model.outputs is {config.model.outputs}, expected a recipe that "
            "trains on text: leave both out"
        )
    # No text is read, so it need not be there either.
    data = DataConfig(packing=config.data.packing, mask_rate=config.data.mask_rate)
    config = dataclasses.replace(config, data=data).validate()
    mesh = sharding.make_mesh(config.mesh, devices=devices)
    sharding.check_batch(config.train.batch_size, mesh, accumulate=config.train.accumulate)
    optimizer = make_optimizer(config.optimizer, config.train.updates, config.model)
    graph, _ = graph_of(config)
    state = abstract_state(config, optimizer, mesh)
    layout = sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
        for name, (shape, dtype) in batch_shapes(config).items()
    }
    jitted = jit_update(make_update(config, graph, optimizer), state, mesh)
    for count in config.trained_counts:
        with jax.set_mesh(mesh):
            yield count, jitted.lower(state, batch, jax.ShapeDtypeStruct((count + 1,), jnp.float32))


def batch_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns the shape and the dtype of each array of a batch of text, as `odelm.data.loader.train_batches` has it."""
    model, rows = config.model, (config.train.batch_size,)
    whole = (*rows, config.train.length)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"tokens": (whole, jnp.int32)}
    if model.kind == "decoder":
        predicted = whole
    else:
        predicted = (*rows, max(1, round(config.data.mask_rate * config.train.length)))
        shapes |= {"mask": (whole, jnp.bool_), "positions": (predicted, jnp.int32)}
    shapes |= {"targets": (predicted, jnp.int32), "weights": (predicted, jnp.float32)}
    if config.packing == "segments":
        shapes["segments"] = (whole, jnp.int32)
    if model.token_types > 1:
        shapes["token_types"] = (whole, jnp.int32)
    if model.sentence_order:
        shapes |= {"order": (rows, jnp.int32), "order_weights": (rows, jnp.float32)}
    return shapes


def table(found: list[Need], topology: str, tokens: int) -> str:
    """Returns the needs as text, with the shortest update that the chips' published figures allow."""
    chip = CHIPS[topology.partition(":")[0]]
    lines = [f"{topology}, each chip with {chip.memory / 1e9:.0f} GB and {chip.flops / 1e12:.0f} TFLOP/s in bfloat16:"]
    for need in found:
        seconds = need.seconds(chip)
        slowest = max(seconds, key=lambda name: seconds[name])
        sent = _shown(need.collectives)
        fits = "" if need.memory <= chip.memory else "; DOES NOT FIT"
        lines.append(
            f"{need.steps:4} steps: {need.memory / 1e9:.2f} GB a chip{fits}; {need.flops / 1e12:.2f} TFLOP, "
            f"{need.traffic / 1e9:.1f} GB to and from memory, sent: {sent}; at least {1e3 * seconds[slowest]:.1f} ms "
            f"({slowest}), so at most {tokens / seconds[slowest] / 1e6:.2f} M tokens/s"
        )
    return "\n".join(lines)


def sent_by(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Returns what an update sends, None where jaxlib cannot read the program that libtpu has made."""
    try:
        return collective_bytes(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError:
        return None


def _shown(collectives: dict[str, int] | None) -> str:
    if collectives is None:
        return "unknown (jaxlib cannot read the program of this libtpu)"
    return ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in collectives.items()) or "nothing"


def collective_bytes(program: str) -> dict[str, int]:
    """Returns the bytes that come out of each kind of collective of a compiled program on one device.

    A collective in a loop counts as often as the loop runs. On a TPU a collective that overlaps other work is written
    into each of the fusions that it overlaps, always with the same channel: it counts once.
    """
    bodies = _computations(program)
    entry = next((name for name in bodies if name.startswith("ENTRY ")), None)
    found: Counter[str] = Counter()
    fused: set[str] = set()

    def add(name: str, times: int, within_fusion: bool) -> None:
        for line in bodies[name]:
            made = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line)
            if made is None:
                continue
            shape, operation = made.groups()
            kind = operation.removesuffix("-start")
            if kind in COLLECTIVES and not (within_fusion and _channel(line) in fused):
                found[kind] += times * bytes_of(shape, with_operands=operation != kind and _has_operands(kind, shape))
            if kind in COLLECTIVES and within_fusion:
                fused.add(_channel(line))
            if operation in ("async-update", "async-done"):
                continue  # its start has called the same computation
            repeated = times * _trips(line, bodies) if operation == "while" else times
            for called in re.findall(r"(?:body|to_apply|calls|called_computations)=\{?%?([\w.\-]+)", line):
                if called in bodies and operation not in ("reduce", "all-reduce", "reduce-scatter"):
                    add(called, repeated, within_fusion or operation == "fusion")

    if entry is not None:
        add(entry, 1, False)
    return dict(found)


def _channel(line: str) -> str:
    found = re.search(r"channel_id=(\d+)", line)
    return found[1] if found else line


def _computations(program: str) -> dict[str, list[str]]:
    """Returns the lines of each computation of a program by its name; that of the entry begins with "ENTRY "."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in program.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if start and not line.startswith(" "):
            current = bodies.setdefault((start[1] or "") + start[2], [])
        else:
            current.append(line)
    return bodies


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Returns how often a loop runs: by its annotated count, or else by its condition; 1 where neither can be read.

    XLA annotates the loops of a program, but not those that it makes itself, to gather a matrix while it is multiplied:
    their counter begins at 0, is raised by a constant and compared with another.
    """
    if found := re.search(r'known_trip_count":?\{"n":"(\d+)"', line):
        return int(found[1])
    condition, body = (re.search(rf"{name}=%?([\w.\-]+)", line) for name in ("condition", "body"))
    if condition is None or body is None:
        return 1
    test, update = ("\n".join(bodies.get(name[1], ())) for name in (condition, body))
    compared = re.search(r"ROOT .* compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT", test)
    place = compared and re.search(rf"%{re.escape(compared[1])} = .*index=(\d+)", test)
    limit = compared and _constant(compared[2], test)
    root = re.search(r"ROOT .* tuple\((.*?)\)", update)
    if not (place and limit and root):
        return 1
    after = re.findall(r"%([\w.\-]+)", root[1])[int(place[1])]
    raised = re.search(rf"%{re.escape(after)} = .* add\(%[\w.\-]+, %([\w.\-]+)\)", update)
    step = raised and _constant(raised[1], update)
    return -(-limit // step) if step else 1


def _constant(name: str, body: str) -> int | None:
    found = re.search(rf"%{re.escape(name)} = .*? constant\((\d+)\)", body)
    return int(found[1]) if found else None


def _has_operands(kind: str, shape: str) -> bool:
    """Whether the shape of a collective that is only started has its operands before its results.

    XLA starts an all-reduce by a dedicated instruction, whose shape has the results only, or by the general one, whose
    shape has both, the operands as a tuple. It writes the name `all-reduce-start` for either.
    """
    return kind != "all-reduce" or shape.startswith("((")


def bytes_of(shape: str, *, with_operands: bool = False) -> int:
    """Returns the bytes of the results in a shape as HLO writes it, where the operands may come first.

    The scalars that follow the results of a collective-permute are not counted.
    """
    if with_operands:
        shape = re.sub(r"(, [su]32\[\](\{[^}]*\})?)+\)$", ")", shape)
    parts = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
    sizes = [BYTES.get(dtype, 4) * int(np.prod([int(n) for n in dims.split(",") if n])) for dtype, dims in parts]
    return sum(sizes[len(sizes) // 2 :] if with_operands and len(sizes) > 1 else sizes)


def _devices(topology: str) -> list[Any]:
    chip = topology.partition(":")[0]
    if chip not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise InputError(
            f"--slice is {topology!r}, expected a chip and a shape, such as v5e:16x16; chips: {', '.join(CHIPS)}"
        )
    from jax.experimental import topologies

    # libtpu lets only one process use the chips of a machine. None is used here, so several may compile at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:
        raise InputError(
            f"no programs can be compiled for {topology} here ({str(error).splitlines()[0][:150]}); "
            "install libtpu: pip install '.[slice]'"
        ) from error


def _as_on_tpu(model: ModelConfig, length: int) -> ModelConfig:
    """Returns a model's config with `auto` replaced by what it is on a TPU."""
    dtype = "bfloat16" if model.dtype == "auto" else model.dtype
    attention = "splash" if model.attention == "auto" and splash_pays(length) else model.attention
    return dataclasses.replace(model, dtype=dtype, attention=attention)

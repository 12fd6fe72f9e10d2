"""A case of `benchmarks.scaling`: a model on a mesh of so many devices, its update timed and what it sends counted."""

import dataclasses
import json
import math
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training import median_of, synthetic
from odelm.config import Config, DataConfig, MeshConfig, load_recipe, replace
from odelm.errors import InputError
from odelm.ode import grid
from odelm.sharding import batch_sharding, batch_share, check_batch, make_mesh, place_batch
from odelm.train.optimizer import make_optimizer
from odelm.train.slice import sent_by
from odelm.train.step import abstract_state, compile_updates, graph_of, init_state, make_update

ONE = "one"
"""The mesh of one device, which weak and strong scaling are both compared with."""
MESH = re.compile(r"(data|fsdp|tensor)\d*(\+(data|fsdp|tensor)\d*)*")
"""Names of other meshes: an axis without a number takes the devices that the others leave."""
DTYPES = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}


@dataclass(frozen=True)
class Shape:
    """A model, and how much of it a device is given."""

    recipe: str
    rows: int
    """Sequences a device of weak scaling, and in all of strong scaling."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


MODELS = {
    "tiny": Shape("decoder_small", 8, {
        "model.vocab_size": 512, "model.width": 64, "model.heads": 8, "model.depth": 4, "model.max_length": 64,
        "train.length": 64,
    }),
    "small": Shape("decoder_small", 32),
    "medium": Shape("decoder_medium", 16),
    "wide": Shape("decoder_medium", 8, {"model.width": 4096, "model.heads": 32, "model.depth": 32}),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model on a mesh."""

    model: str
    mesh: str
    """An axis for all devices, such as `data`, or several, such as `data+tensor2`; or `ONE`."""
    devices: int
    scaling: str
    """`weak`, `strong`, or of one device `both`."""

    @property
    def name(self) -> str:
        return f"{self.model}/{self.mesh}/{self.devices}/{self.scaling}"

    @property
    def alone(self) -> "Case":
        """The case of one device that this one is compared with."""
        return Case(self.model, ONE, 1, "both")

    @classmethod
    def named(cls, name: str) -> "Case":
        """Returns the case of a name."""
        model, mesh, devices, scaling = name.split("/")
        return cls(model, mesh, int(devices), scaling)

    def config(self, rows: int = 0) -> Config:
        """Returns the recipe of the case; `rows` replaces those of the model. Raises InputError for what is no mesh.

        The optimiser is AdamW: Muon's products are the same on each device of a `data` mesh, however many there are.
        """
        shape = MODELS[self.model]
        rows = (rows or shape.rows) * (self.devices if self.scaling == "weak" else 1)
        config = replace(
            load_recipe(shape.recipe), shape.changes | {"train.batch_size": rows, "optimizer.kind": "adamw"}
        )
        return dataclasses.replace(config, mesh=mesh_of(self.mesh, self.devices), data=DataConfig()).validate()


def mesh_of(name: str, devices: int) -> MeshConfig:
    """Returns the mesh of a name (`MESH`). Raises InputError where it does not divide the devices."""
    parts = [] if name == ONE else re.findall(r"([a-z]+)(\d*)", name)
    sizes = {axis: int(size or -1) for axis, size in parts}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    left = list(sizes.values()).count(-1)
    if left > 1 or devices % fixed or (not left and fixed != devices):
        raise InputError(f"the mesh {name} cannot be made of {devices} devices")
    axes = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    return MeshConfig(**({"data": 1} | axes))


def run_case(case: Case, counts: tuple[int, ...], *, rows: int, calls: int, repeats: int, predict: bool) -> int:
    """Prints a line of JSON of the case, and one for each count of steps once it is measured; returns the status.

    The first process of several prints. What goes wrong is printed as `error`. With `predict` programs are compiled and
    not run.
    """
    try:
        for part in _parts(case, counts, rows=rows, calls=calls, repeats=repeats, predict=predict):
            if jax.process_index() == 0:
                print(json.dumps(part), flush=True)
    except Exception as error:
        if not isinstance(error, InputError):
            traceback.print_exc()
        if jax.process_index() == 0:
            print(json.dumps({"error": str(error).splitlines()[0][:200]}), flush=True)
        return 1
    return 0


def _parts(
    case: Case, counts: tuple[int, ...], *, rows: int, calls: int, repeats: int, predict: bool
) -> Iterator[dict[str, Any]]:
    config = case.config(rows)
    if predict:
        config = replace(
            config, {"model.dtype": "float16"}
        )  # 16 bits that a CPU computes with, as bfloat16 it does not
    if jax.process_count() > 1 and case.devices < jax.device_count():
        raise InputError(f"all {jax.device_count()} devices of {jax.process_count()} processes are needed")
    mesh = make_mesh(config.mesh, devices=jax.devices()[: case.devices])
    check_batch(config.train.batch_size, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.updates, config.model)
    graph, _ = graph_of(config)
    update = make_update(config, graph, optimizer)
    state = (abstract_state if predict else init_state)(config, optimizer, mesh)
    batch = (_abstract_batch if predict else _batch)(config, mesh)
    yield _description(config, state)
    box = [state, {"loss": None}]
    for count in counts:
        start = time.perf_counter()
        compiled: Any = compile_updates(update, box[0], batch, (count,), mesh, lambda _: None)[count]
        memory = compiled.memory_analysis()
        found = {
            "compile_s": time.perf_counter() - start,
            "collectives": sent_by(compiled),
            "scratch_gib": memory.temp_size_in_bytes / 2**30,
        }
        if not predict:
            found["seconds"] = _timed(compiled, box, batch, grid.equal(config.model.core, count), calls, repeats)
            found["loss"] = float(box[1]["loss"])
        yield {"counts": {str(count): found}}


def _timed(compiled: Any, box: list[Any], batch: Any, times: np.ndarray, calls: int, repeats: int) -> float:
    """Returns the median seconds of an update; `box` holds the state, which each call donates, and the metrics."""

    def run() -> None:
        box[:] = compiled(box[0], batch, times)

    run()
    return median_of(run, lambda: jax.block_until_ready(box), calls=calls, repeats=repeats)


def _description(config: Config, state: Any) -> dict[str, Any]:
    return {
        "axes": config.mesh.axes,
        "rows": config.train.batch_size,
        "length": config.train.length,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "device": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "jax": jax.__version__,
    }


def _batch(config: Config, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Returns synthetic tokens, of which each process makes its own rows."""
    share, shares = batch_share(mesh)
    return place_batch(synthetic(config, share=share, shares=shares), mesh)


def _abstract_batch(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    shape, layout = (config.train.batch_size, config.train.length), batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=layout) for name, dtype in DTYPES.items()}

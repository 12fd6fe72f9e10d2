"""Where arrays live: the mesh, the one table from parameter paths to partitions, and batch placement."""

import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from odelm.config import MeshConfig
from odelm.errors import InputError
from odelm.models.parameters import name_of

Tree = TypeVar("Tree")

PARTITIONS: tuple[tuple[str, PartitionSpec], ...] = ((r".*", PartitionSpec()),)
"""The first pattern that matches a parameter's path (`blocks/0/attention/qkv/kernel`) says how it is cut."""


def make_mesh(config: MeshConfig) -> Mesh:
    """Returns the mesh of all devices of all processes; its one axis, `data`, cuts the batch.

    Axis types are Auto, because `diffrax.diffeqsolve` does not trace under Explicit ones.
    """
    available = jax.device_count()
    size = available if config.data == -1 else config.data
    if size > available:
        raise InputError(f"mesh.data is {size}, but there are {available} devices; -1 takes all there are")
    return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays (B, ..) cut along the batch."""
    return NamedSharding(mesh, PartitionSpec("data"))


def state_shardings(tree: Tree, mesh: Mesh) -> Tree:
    """Returns a tree of shardings for a tree of parameters (or of anything shaped like them)."""

    def sharding(path: tuple, _: object) -> NamedSharding:
        return NamedSharding(mesh, next(spec for pattern, spec in PARTITIONS if re.fullmatch(pattern, name_of(path))))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices, as one global array (B, ..) each."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError if the batch does not divide over the mesh."""
    size = mesh.shape["data"]
    if batch_size % size:
        raise InputError(
            f"train.batch_size is {batch_size}, which does not divide over {size} devices; "
            f"try {max(size, round(batch_size / size) * size)}, or a smaller mesh.data"
        )

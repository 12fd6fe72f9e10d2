"""Where arrays live: the mesh, the logical axes of parameters, the one table from these to mesh axes, and the batch.

A mesh has three axes. `data` cuts the batch. `fsdp` cuts it too, and the parameters with their optimiser state, which
are gathered where they are used. `tensor` cuts heads, hidden units and vocabulary, so that products are shared out.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from odelm.config import MeshConfig
from odelm.errors import InputError
from odelm.models.arrays import BATCH_AXES
from odelm.models.parameters import name_of

Tree = TypeVar("Tree")
Axes = tuple[str | None, ...]

LOGICAL_AXES: tuple[tuple[str, Axes], ...] = (
    (r"(embed|head)/tokens", ("vocab", "width")),
    (r"embed/(learned|types)", (None, "width")),
    (r"(embed|head)/project/kernel", (None, "width")),
    (r".*attention/(qkv|key_value)/kernel", ("width", None, "heads", None)),
    (r".*attention/(qkv|key_value)/bias", (None, "heads", None)),
    (r".*attention/query/kernel", ("width", "heads", None)),
    (r".*attention/query/bias", ("heads", None)),
    (r".*attention/out/kernel", ("heads", None, "width")),
    (r".*feedforward/up/kernel", ("width", "hidden")),
    (r".*feedforward/up/bias", ("hidden",)),
    (r".*feedforward/down/kernel", ("hidden", "width")),
    (r".*modulation/(out|wide)/kernel", (None, "width")),
    (r".*residual/[a-z_]+/down", (None, "width", None)),
    (r".*residual/[a-z_]+/up", (None, None, "width")),
    (r"head/bias", ("vocab",)),
    # Vectors of the width, small matrices and heads for a class: every device holds them whole.
    (r".*(scale|bias)|.*(weights|by_time)|.*modulation/hidden/kernel|(order|head)/(pool|out)/kernel", ()),
)
"""The first pattern that matches the whole of a parameter's name (`blocks/0/attention/qkv/kernel`) names its axes."""

MESH_AXES: dict[str, str] = {"vocab": "tensor", "heads": "tensor", "hidden": "tensor", "width": "fsdp"}
"""Which axis of the mesh cuts which logical axis."""


def make_mesh(config: MeshConfig, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of all devices of all processes, or of those given, with the axes `data`, `fsdp` and `tensor`.

    Axis types are Auto, because `diffrax.diffeqsolve` does not trace under Explicit ones. Raises InputError if the axes
    need more devices than there are.
    """
    devices = jax.devices() if devices is None else devices
    available, sizes = len(devices), dict(config.axes)
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if known > available or (-1 in sizes.values() and available % known):
        raise InputError(
            f"the mesh is {config.shown()}, but there are {available} devices; "
            f"{'-1 takes what is left, which must divide evenly' if -1 in sizes.values() else '-1 takes what is left'}"
        )
    shape = [available // known if size == -1 else size for size in sizes.values()]
    used = devices[: int(np.prod(shape))]
    if jax.process_count() > 1 and len(used) < available:
        raise InputError(
            f"the mesh is {config.shown()}, which leaves {available - len(used)} of {available} devices of "
            f"{jax.process_count()} processes without work; let one axis be -1"
        )
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape), devices=used)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays (B, ..) cut along the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def every_device(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array (devices,), one number for each device of the mesh."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def state_shardings(tree: Tree, mesh: Mesh) -> Tree:
    """Returns a tree of shardings for a tree of parameters, or of anything that holds arrays shaped like them.

    Raises InputError for a parameter that no pattern of `LOGICAL_AXES` matches, and for one that the mesh does not
    divide.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(name_of(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def placements(tree: Tree, mesh: Mesh | None) -> Tree:
    """Returns `state_shardings`, or without a mesh a tree of shardings that put everything on the first device."""
    if mesh is not None:
        return state_shardings(tree, mesh)
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: first, tree)


def logical_axes(name: str) -> Axes | None:
    """Returns the logical axes of a parameter by its name; None if no pattern matches.

    The name may stand behind others, as in the optimiser's state (`0/mu/blocks/0/attention/qkv/kernel`).
    """
    parts = name.split("/")
    for start in range(len(parts)):
        rest = "/".join(parts[start:])
        if rest.startswith(("embed/", "head/", "blocks/", "prelude/", "coda/", "final_norm/", "order/")):
            return next((axes for pattern, axes in LOGICAL_AXES if re.fullmatch(pattern, rest)), None)
    return ()


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes = logical_axes(name)
    if axes is None:
        raise InputError(f"no pattern of odelm.sharding.LOGICAL_AXES matches {name}, {shape}: add one")
    if not shape:
        return PartitionSpec()
    cuts = [None if axis is None or MESH_AXES[axis] not in mesh.shape else MESH_AXES[axis] for axis in axes]
    for size, cut in zip(shape, cuts, strict=False):
        if cut is not None and size % mesh.shape[cut]:
            raise InputError(
                f"mesh.{cut} is {mesh.shape[cut]}, which does not divide {name}, {shape}; try a smaller mesh.{cut}"
            )
    return PartitionSpec(*cuts)


def summary(params: Any, mesh: Mesh) -> Iterable[str]:
    """Yields what each kind of parameter is cut by, with its bytes on a device: a line for each row of the table."""
    whole: dict[str, int] = {}
    held: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        spec = _spec(name_of(path), leaf.shape, mesh)
        cut = ", ".join(f"{axis} by {mesh.shape[axis]}" for axis in spec if axis is not None and mesh.shape[axis] > 1)
        parts = int(np.prod([mesh.shape[axis] for axis in spec if axis is not None], initial=1))
        whole[cut] = whole.get(cut, 0) + leaf.size * leaf.dtype.itemsize
        held[cut] = held.get(cut, 0) + leaf.size * leaf.dtype.itemsize // parts
    for cut in sorted(whole, reverse=True):
        yield f"parameters cut along {cut or 'nothing'}: {whole[cut] / 1e6:,.1f} MB, {held[cut] / 1e6:,.1f} a device"


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices, as one global array (B, ..) each; see `batch_share`."""
    sharding, (_, count) = batch_sharding(mesh), batch_share(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (len(rows) * count, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Returns which of how many equal shares of a batch this process has to bring: as the mesh lays out its devices.

    Processes between which only `tensor` cuts bring the same rows.
    """
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    rows = batch_sharding(mesh).addressable_devices_indices_map((parts,)).values()
    mine = sorted({(index[0].start or 0) for index in rows if index is not None})
    share = len(mine)
    if mine != list(range(mine[0], mine[0] + share)) or mine[0] % share or parts % share:
        raise InputError(
            f"this process has parts {mine} of {parts} of a batch, which are no equal share of it; make mesh.tensor "
            "divide the devices of a process, or be a multiple of them"
        )
    return mine[0] // share, parts // share


def check_batch(batch_size: int, mesh: Mesh, *, accumulate: int = 1) -> None:
    """Raises InputError if the batch, or each of the parts it is computed in, does not divide over the mesh."""
    size = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])) * accumulate
    if batch_size % size:
        parts = f" in {accumulate} parts (train.accumulate)" if accumulate > 1 else ""
        raise InputError(
            f"train.batch_size is {batch_size}, which does not divide over {size // accumulate} devices{parts}; "
            f"try {max(size, round(batch_size / size) * size)}, or a smaller mesh.data"
        )

"""Where arrays live: the mesh, the logical axes of parameters, the one table from these to mesh axes, and the batch.

A mesh has three axes. `data` cuts the batch. `fsdp` cuts it too, and the parameters with their optimiser state, which
are gathered where they are used. `tensor` cuts heads, hidden units and vocabulary, so that products are shared out.
"""

import re
import textwrap
from collections import Counter
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

    The name may follow others, as in the optimiser's state (`0/mu/blocks/0/attention/qkv/kernel`).
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
    """Yields a table, a line at a time: the axes of the mesh that cut each logical axis, then a row for each cut.

    A row has the bytes of its parameters, how many of them a device holds, and their names: `*` is any number, and
    braces hold names that differ in one place.
    """
    axes: dict[tuple[str, ...], list[str]] = {BATCH_AXES: ["batch"]}
    for logical, axis in MESH_AXES.items():
        axes.setdefault((axis,), []).append(logical)
    yield "logical axes: " + "; ".join(f"{', '.join(cut)} -> {_sizes(by, mesh)}" for by, cut in axes.items())
    whole: Counter[str] = Counter()
    held: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        spec = _spec(name_of(path), leaf.shape, mesh)
        used = [axis for axis in mesh.axis_names if axis in spec and mesh.shape[axis] > 1]
        cut, size = _sizes(used, mesh) or "nothing", leaf.size * leaf.dtype.itemsize
        whole[cut] += size
        held[cut] += size // int(np.prod([mesh.shape[axis] for axis in used], initial=1))
        names.setdefault(cut, []).append(name_of(path))
    room = max(18, *(len(cut) + 1 for cut in whole))
    yield f"{'cut by':<{room}}{'MB':>10}{'a device':>10}  parameters"
    for cut, size in whole.most_common():
        row = f"{cut:<{room}}{size / 1e6:>10,.2f}{held[cut] / 1e6:>10,.2f}  "
        yield from textwrap.wrap(
            row + _short(names[cut]), width=120, subsequent_indent=" " * len(row), break_on_hyphens=False,
            break_long_words=False,
        )  # fmt: skip


def _sizes(axes: Iterable[str], mesh: Mesh) -> str:
    return ", ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)


def _short(names: Iterable[str]) -> str:
    """Returns names of parameters as patterns: those that differ in their last name but one are written as one."""
    differ: dict[tuple[str, str], set[str]] = {}
    for name in names:
        *before, module, last = re.sub(r"(?<=/)\d+(?=/)", "*", name).split("/")
        differ.setdefault(("/".join([*before, ""]) if before else "", last), set()).add(module)
    shown = ((before, sorted(modules), last) for (before, last), modules in differ.items())
    return ", ".join(
        f"{before}{modules[0] if len(modules) == 1 else '{' + ','.join(modules) + '}'}/{last}"
        for before, modules, last in shown
    )


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices, as one global array (B, ..) each; see `batch_share`."""
    sharding, (_, count) = batch_sharding(mesh), batch_share(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (len(rows) * count, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (number, count): which of how many equal shares of a batch this process provides, by the mesh's device
    layout.

    Processes that only the axis `tensor` separates provide the same rows.
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

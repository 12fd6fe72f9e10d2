"""A card that is not there, for which XLA can compile all the same (docs/kernels.md)."""

from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

UNTIMED = {"xla_gpu_autotune_level": 0}
"""Compiler options without which XLA would choose kernels by timing them."""


def card_of(target: Path) -> Any:
    """Returns the device that a GpuTargetConfigProto describes, as text in a file."""
    options = dict(platform="cuda", topology_name="card", topology="1x1x1", target_config=target.read_text())
    return topologies.get_topology_desc(**options).devices[0]


def shapes_on(card: Any, tree: Any) -> Any:
    """Returns the shapes of a tree's arrays, for programs that are lowered for the card."""
    there = SingleDeviceSharding(card)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), tree)

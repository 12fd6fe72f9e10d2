"""The bytes that a memory will take, known before it is allocated."""

import os
from typing import Any

import jax

from odelm.errors import InputError
from odelm.models.transformer import DepthPlan, SharedTransformer


def bytes_a_place(model: SharedTransformer, plan: DepthPlan) -> int:
    """Returns the bytes of one position of one row in a memory of `plan`, computed only from shapes."""
    memory = jax.eval_shape(lambda: model.memory(plan, batch=1, room=1))
    kept = (memory.blocks, memory.real, memory.segments)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def free_bytes(device: Any) -> int | None:
    """Returns the free bytes of a device, or all memory of the machine for a CPU; None if unknown."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def check_fits(needed: int, params: Any, what: str) -> None:
    """Raises InputError if the devices that hold `params` have together fewer than `needed` bytes free."""
    devices = jax.tree.leaves(params)[0].sharding.device_set
    free = [free_bytes(device) for device in devices]
    total = sum(bytes for bytes in free if bytes is not None)
    if None not in free and needed > total:
        raise InputError(
            f"{what}, takes {needed:,} bytes, but {len(devices)} devices have {total:,} free: "
            "give fewer prompts, ask for fewer new tokens, or take fewer steps"
        )

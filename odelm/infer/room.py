"""The bytes that a memory will take, known before it is allocated."""

import os

import jax

from odelm.errors import InputError
from odelm.models.transformer import DepthPlan, SharedTransformer


def bytes_a_place(model: SharedTransformer, plan: DepthPlan) -> int:
    """Returns what one position of one row takes in a memory of `plan`, by its shapes alone."""
    memory = jax.eval_shape(lambda: model.memory(plan, batch=1, room=1))
    kept = (memory.blocks, memory.real, memory.segments)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def free_bytes() -> int | None:
    """Returns what the first device has free, of a CPU what the machine has in all; None if nobody says."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def check_fits(needed: int, what: str) -> None:
    """Raises InputError if the device has less free than so many bytes."""
    free = free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"{what} takes {needed / 1e9:.1f} GB, but the device has {free / 1e9:.1f} GB free: "
            "give fewer prompts, ask for fewer new tokens, or take fewer steps"
        )

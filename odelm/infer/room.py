"""The bytes that a memory will take, known before it is allocated."""

from pathlib import Path
from typing import Any

import jax
import psutil

from odelm.errors import InputError
from odelm.models.transformer import DepthPlan, SharedTransformer


def bytes_a_place(model: SharedTransformer, plan: DepthPlan, window: int | None = None) -> int:
    """Returns the bytes of one position of one row in a memory of `plan`, computed only from shapes."""
    memory = jax.eval_shape(lambda: model.memory(plan, batch=1, room=1, window=window))
    kept = (memory.blocks, memory.real, memory.segments, memory.positions)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


GROUP = Path("/sys/fs/cgroup")
"""Where Linux says how much memory a container may have, in bytes."""


def free_bytes(device: Any) -> int | None:
    """Returns the free bytes of a device, for a CPU those that the machine and the process's container have available;
    None if unknown."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # there is no container, or it has no limit ("max")
        return free
    return max(min(free, limit - used), 0)


def check_generation(generator: Any, rows: int, longest: int, new_tokens: int) -> None:
    """Raises InputError if the memory in which an `odelm.Generator` would continue `rows` prompts of up to `longest`
    tokens does not fit on its devices."""
    width, _ = generator.sizes(longest, new_tokens)
    # The memory of the prompts is only freed after it has been copied into the one that is kept.
    needed = generator.memory_bytes(rows, longest, new_tokens) + rows * width * generator.place_bytes[0]
    what = f"a memory of {generator.places(longest, new_tokens)} positions of {rows} rows, after its prompts"
    check_fits(needed, generator.runner.params, what)


def check_fits(needed: int, params: Any, what: str) -> None:
    """Raises InputError if the devices that hold `params` have together fewer than `needed` bytes free."""
    devices = jax.tree.leaves(params)[0].sharding.device_set
    free = [free_bytes(device) for device in devices]
    total = sum(bytes for bytes in free if bytes is not None)
    if None not in free and needed > total:
        raise InputError(
            f"{what}, takes {needed:,} bytes, but {_counted(len(devices))} {total:,} free: "
            "give fewer prompts, ask for fewer new tokens, or take fewer steps"
        )


def _counted(devices: int) -> str:
    return "its device has" if devices == 1 else f"{devices} devices have"

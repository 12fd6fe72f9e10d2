"""Which kernels take the time of a compiled call on a GPU: a trace by `jax.profiler`, summed by kind."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax

KINDS = (
    ("matrix products", r"gemm|cutlass|cublas|nvjet|xmma|triton_softmax_dot|_dot"),
    ("attention", r"flash|sdpa|fmha|cudnn"),
    ("collectives", r"nccl|all-?reduce|all-?gather|reduce-?scatter"),
    ("copies", r"memcpy|memset|copy|transpose"),
    ("elementwise and reductions", r"fusion|reduce|scatter|gather|sort|select|convert|add|multiply|wrapped"),
)


def profile(step: Callable[[], None], directory: Path, *, calls: int = 3, top: int = 30) -> dict[str, float]:
    """Returns the milliseconds a call of `step`, by kind of kernel, then of the `top` kernels by name."""
    step()
    with jax.profiler.trace(str(directory)):
        for _ in range(calls):
            step()
    path = next(directory.rglob("*.xplane.pb"))
    names: dict[str, float] = defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                names[event.name] += event.duration_ns / 1e6 / calls
    kinds: dict[str, float] = defaultdict(float)
    for name, milliseconds in names.items():
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
        kinds[f"all {kind}"] += milliseconds
    largest = sorted(names.items(), key=lambda item: -item[1])[:top]
    return {"all": sum(names.values())} | dict(sorted(kinds.items(), key=lambda item: -item[1])) | dict(largest)

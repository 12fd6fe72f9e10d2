"""How a kernel is made from a layout, and where the continuation of texts begins."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from odelm.models.kernels.arrays import by_name, scratch
from odelm.models.kernels.layout import COLUMNS, Layout
from odelm.models.kernels.program import Program, Ref

plgpu: Any = mosaic_gpu
PROFILED = 300
"""Begin and end events that a trace has room for: enough for a token in 6 steps; more would not fit into shared
memory."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Begin:
    """Where the continuation of the texts of B rows begins; int32 (B,) or ()."""

    token: jax.Array
    """(B,), the newest token of each, which is not in the memory yet."""
    position: jax.Array
    """(B,), its position."""
    place: jax.Array
    """(B,), where its key and value go in the memory: behind all others."""
    done: jax.Array
    """(B,), 1 for a row that has ended; with a single row, nothing is computed then."""
    count: jax.Array
    """(), how many tokens to generate at most."""
    end: jax.Array
    """(), the token after which a row ends; -1 is none."""

    def texts(self) -> jax.Array:
        """Returns what `tokens.TEXTS` names, int32 (.., columns of a product)."""
        found = jnp.stack([self.token, self.position, self.place, self.done]).astype(jnp.int32)
        return jnp.pad(found, ((0, 0), (0, -found.shape[1] % COLUMNS)))


@dataclass(frozen=True)
class Kernels:
    """The kernels of a layout; `interpret` is `plgpu.InterpretGPUParams()` to run them without a GPU."""

    layout: Layout
    interpret: Any = None
    profile: str = ""
    """A folder for traces of each launch, Chrome's JSON, in cycles."""

    def make(self, run: Callable[..., None], *, programs: int | None = None) -> Callable[..., None]:
        """Returns a kernel that calls `run(program, numbers, *refs)` and takes (refs of `Program`, numbers, *refs).

        The programs do not wait for each other if `programs`, their number, is given.
        """
        layout, meeting = self.layout, programs is None

        def body(matrices: Any, vectors: Any, memory: Any, between: Any, numbers: Ref, *refs: Any) -> None:
            *given, _, near = refs
            me, near = lax.axis_index("program"), by_name(near)
            run(Program(layout, me, matrices, vectors, between, memory[0], memory[1], near, meeting), numbers, *given)

        out = jax.ShapeDtypeStruct((1,), jnp.int32)  # a kernel must have one
        options: dict[str, Any] = {} if self.interpret is None else {"interpret": self.interpret}
        if self.profile:  # a trace needs the shared memory that reductions would have
            params = plgpu.CompilerParams(profile_space=PROFILED, profile_dir=self.profile)
        else:
            params = plgpu.CompilerParams(reduction_scratch_bytes=layout.reduction_bytes)
        options["compiler_params"] = params
        kernel = plgpu.kernel(
            body, out_type=out, scratch_types=[scratch(layout)], grid=(programs or layout.programs,),
            grid_names=("program",), **options,
        )  # fmt: skip
        return lambda *refs: (kernel(*refs), None)[1]

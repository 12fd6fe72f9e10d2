"""Chooses what decodes: a kernel that stays on the GPU, one launched for each phase of a step, or XLA's program.

In the cases that were measured a kernel is faster than XLA, and the one that stays on the GPU is fastest
(docs/kernels.md).
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from odelm.errors import InputError
from odelm.infer.decode import Decoding
from odelm.infer.runner import Runner
from odelm.infer.sampling import Sampling
from odelm.models import CausalLM
from odelm.models.kernels.layout import MOST_ROWS, PROGRAMS, Layout
from odelm.models.kernels.layout_choice import layout_of
from odelm.models.kernels.supported import block_bits, unsupported
from odelm.models.precision import compute_dtype
from odelm.models.transformer import DepthPlan

KERNELS = ("auto", "persistent", "launches", "xla")
"""The valid names; "auto" takes the first of the others that can decode the case."""
INTERPRETED: Any = None
"""Pallas's options to run kernels without a GPU, for tests."""
Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Choice:
    """What decodes, and, if it is XLA, why no kernel does."""

    kernel: str
    """One of `KERNELS` except "auto"."""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kernel} ({self.reason})" if self.reason else self.kernel


class ByKernel:
    """Decodes rows by a kernel if one supports them; keeps the arrays of the model that a kernel reads.

    Raises InputError for a name that is not in `KERNELS`, and for a kernel together with `drafts`.
    """

    def __init__(self, asked: str, *, drafts: bool):
        if asked not in KERNELS:
            raise InputError(f"kernel is {asked!r}, expected one of {', '.join(KERNELS)}")
        if drafts and asked not in ("auto", "xla"):
            raise InputError(f"kernel {asked!r} takes no drafts: leave out one of them")
        self.asked, self.choice = asked, Choice("xla", "drafts" if drafts else "")
        self._matrices: dict[Layout, Arrays] = {}
        self._vectors: dict[Layout, Arrays] = {}
        self._failed: dict[Layout, str] = {}

    def choose(
        self, runner: Runner, plan: DepthPlan, state: Decoding, sampling: Sampling, *, early_exit: bool = False
    ) -> bool:
        """Returns whether a kernel decodes rows of a model along a plan; InputError if the one requested by name
        cannot."""
        if self.asked != "xla":
            reason = _no_kernel(_decoder(runner), plan, state, sampling, early_exit)
            if reason is None and self._failed:
                reason = self._failed.get(_layout(_decoder(runner), plan, state, sampling))
            device = next(iter(state.tokens.sharding.device_set))
            filtered = not sampling.greedy and bool(sampling.top_k)
            one = len(state.last) == 1 and runner.model.quantization is None
            self.choice = choose(self.asked, reason, device, filtered=filtered, one=one)
        return self.choice.kernel != "xla"

    def advance(
        self, runner: Runner, plan: DepthPlan, state: Decoding, sampling: Sampling, until: jax.Array, *, end: int
    ) -> Decoding | None:
        """Returns the same as `odelm.infer.decode.advance`, computed by the chosen kernel.

        None if this release of JAX lacks an operation that the kernel needs: the choice is then XLA, for calls to come
        too. InputError if that kernel was requested by name.
        """
        layout = _layout(_decoder(runner), plan, state, sampling)
        # The matrices depend only on the bits of the readout and on the size of its pieces.
        same: dict[str, Any] = dict(room=0, rows=1, chunk_splits=1, chunk_places=1, ring=0, by_warps=False, pairs=False)
        same |= dict(attends_by_warps=False, short_sums=False, sampled=False, filtered=False)
        alike = dataclasses.replace(layout, **same)
        if alike not in self._matrices:
            last = list(self._matrices.items())[-1:]  # calls with one row, several, or top_k may alternate
            self._matrices = dict(last) | {alike: _matrices(runner.graph, runner.params, alike)}
        if layout not in self._vectors:
            self._vectors[layout] = _vectors(runner.graph, runner.params, plan, layout)
        tables, persistent = (self._matrices[alike], self._vectors[layout]), self.choice.kernel == "persistent"
        try:
            return _advance(layout, persistent, end, tables, state, sampling, until)
        except NotImplementedError as error:  # raised while compiling, so that `state` is not donated yet
            reason = f"jax {jax.__version__} does not compile the kernel: {str(error).partition(chr(10))[0]}"
            if self.asked != "auto":
                raise InputError(_refused(self.asked, reason)) from error
            self._failed[layout], self.choice = reason, Choice("xla", reason)
            return None


def choose(asked: str, reason: str | None, device: Any, *, filtered: bool = False, one: bool = True) -> Choice:
    """Returns what decodes on a device. `reason` is why no kernel supports the case, or None; `filtered` is whether
    tokens are drawn with `top_k`, `one` whether there is one row, and matrices are not in 8 bits."""
    reason = reason or _no_card(device)
    at_once = PROGRAMS if INTERPRETED is not None else getattr(device, "core_count", 0)
    few = at_once < PROGRAMS
    if reason is None and filtered and (few or asked == "launches"):
        reason = "tokens are drawn with top_k, which launches do not support"
    if reason is None and few and asked == "auto" and not one:
        reason = f"the card runs fewer programs at once than {PROGRAMS}; auto uses launches only for what was timed"
    if reason is None and few and asked == "persistent":
        reason = f"the card runs {at_once} programs at once, of the {PROGRAMS} that wait for each other"
    if reason is None:
        return Choice("launches" if asked == "launches" or few else "persistent")
    if asked != "auto":
        raise InputError(_refused(asked, reason))
    return Choice("xla", reason)


def _refused(asked: str, reason: str) -> str:
    return f"kernel {asked!r} cannot decode this: {reason}; kernel 'auto' takes what can"


def _no_kernel(model: CausalLM, plan: DepthPlan, state: Decoding, sampling: Sampling, early_exit: bool) -> str | None:
    """Returns why no kernel can decode this on any GPU; None if one can."""
    missing = unsupported(model, plan)
    if missing is not None:
        return missing
    dtype, rows = compute_dtype(model.config), len(state.last)
    drawn = not sampling.greedy
    filters = drawn and (sampling.top_p < 1 or sampling.min_p > 0) or state.seen is not None
    told = partial(getattr, jax.config)
    bits = told("jax_threefry_partitionable") and not told("jax_high_dynamic_range_gumbel")
    reasons = {
        f"its products are in {dtype}, not bfloat16": dtype != jnp.bfloat16 and INTERPRETED is None,
        f"{rows} rows; kernels take at most {MOST_ROWS}": rows > MOST_ROWS,
        "top_k with several rows": drawn and bool(sampling.top_k) and rows > 1,
        "top_k with matrices of 8 bits": drawn and bool(sampling.top_k) and model.quantization is not None,
        "several rows with matrices of 8 bits": rows > 1 and model.quantization is not None,
        "tokens leave the depth early": early_exit,
        "its memory is a ring": state.memory.window is not None,
        "tokens are drawn with top_p, min_p or a penalty": bool(filters),
        "the random keys are not Threefry's": drawn and jax.random.key_impl(state.key) != "threefry2x32",
        "random numbers are drawn in another way than JAX does by default": drawn and not bits,
        "its parameters lie on several devices": len(state.tokens.sharding.device_set) > 1,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is None and not _layout(model, plan, state, sampling).fits:
        return "its blocks need more shared memory than a program has"
    return reason


def _decoder(runner: Runner) -> CausalLM:
    assert isinstance(runner.model, CausalLM)
    return runner.model


def _no_card(device: Any) -> str | None:
    """Returns why a device cannot run kernels; None if it can."""
    if INTERPRETED is not None:
        return None
    if device.platform != "gpu":
        return "there is no GPU"
    if jax.__version_info__ < (0, 11):
        return f"kernels need jax 0.11 or later; this is {jax.__version__}"
    found = str(getattr(device, "compute_capability", "unknown"))
    return None if found.startswith("9.") else f"kernels are for compute capability 9; this card's is {found}"


def _layout(model: CausalLM, plan: DepthPlan, state: Decoding, sampling: Sampling) -> Layout:
    options: dict[str, Any] = {} if INTERPRETED is None else dict(programs=1, dtype=jnp.float32)
    options |= dict(sampled=not sampling.greedy, filtered=not sampling.greedy and bool(sampling.top_k))
    options |= dict(rows=len(state.last), block_bits=block_bits(model))
    return layout_of(model.config, plan, state.memory.room, **options)


@partial(jax.jit, static_argnums=(0, 2))
def _matrices(graph: nnx.GraphDef, params: Any, layout: Layout) -> Arrays:
    """Returns the arrays of a model that a kernel reads for every text: see `odelm.models.kernels.tables`."""
    from odelm.models.kernels.tables import matrices

    return matrices(nnx.merge(graph, params), layout)


@partial(jax.jit, static_argnums=(0, 3))
def _vectors(graph: nnx.GraphDef, params: Any, plan: DepthPlan, layout: Layout) -> Arrays:
    """Returns the arrays of a model that a kernel reads along a plan, for a memory of the layout's room."""
    from odelm.models.kernels.tables import vectors

    return vectors(nnx.merge(graph, params), plan, layout)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _advance(
    layout: Layout,
    persistent: bool,
    end: int,
    tables: tuple[Arrays, Arrays],
    state: Decoding,
    sampling: Sampling,
    until: jax.Array,
) -> Decoding:
    """Returns the result of `advance_in_kernel`, and reuses the memory of `state`."""
    from odelm.infer.in_kernel import advance_in_kernel  # Pallas takes a second to import, and lacks this in jax 0.10
    from odelm.models.kernels.decode import Kernels

    kernels = Kernels(layout, INTERPRETED)
    return advance_in_kernel(tables, state, sampling, until, kernels=kernels, end=end, persistent=persistent)

"""Embed, prelude, integrate over depth, coda, normalise: what the language models and the classifier have in common."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from odelm import ode
from odelm.config import ModelConfig
from odelm.errors import InputError, nearest
from odelm.models.block import SharedBlock
from odelm.models.chain import BlockChain
from odelm.models.embed import Embed
from odelm.models.field import BlockField, key_at
from odelm.models.inputs import Array, Inputs, as_inputs
from odelm.models.kv_sharing import kept_times, sharing_of
from odelm.models.lanes import LaneBlock, joined, split
from odelm.models.memory import Memory, carried_keys, check_memory, empty_keys, empty_memory
from odelm.models.norm import Norm
from odelm.models.precision import state_dtype
from odelm.models.stretches import Crossing, Grid, stretches, with_ends
from odelm.models.view import View, see
from odelm.ode.solver import is_own_step

DepthPlan = tuple[ode.Plan, ...]
"""One plan for each block in turn: those of the prelude, of each group of the core, and of the coda."""
INTEGRATORS = ("scan", "diffrax")


class SharedTransformer(nnx.Module):
    """A Transformer whose core is an interval of time, crossed by `groups` shared blocks in turn.

    Before the core there are `prelude` blocks of their own, after it `coda` ones, each a layer. Subclasses add
    `readout(hidden)`; calling the model is `readout(encode(...))`.
    """

    field_class = "its blocks: odelm.models.BlockField(model.blocks[0])"

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config = dataclasses.replace(config.validate())
        # The cheapest crossing that keeps a promise about the loss, if `odelm.load` has found one.
        self.profile: Crossing | None = None
        # How `odelm.quantize` has quantised its matrices, if it has.
        self.quantization: str | None = None
        self.embed = Embed(config, rngs=rngs)
        block = SharedBlock if config.inner_blocks == 1 else BlockChain
        core = block if config.lanes == 1 else LaneBlock
        starts = ode.grid.boundaries(config.core, config.groups)[:-1]
        self.prelude = nnx.List([block(config, first=i, single=True, rngs=rngs) for i in range(config.prelude)])
        self.blocks = nnx.List([core(config, first=config.prelude, start=float(t), rngs=rngs) for t in starts])
        after = range(config.depth - config.coda, config.depth)
        self.coda = nnx.List([block(config, first=i, single=True, rngs=rngs) for i in after])
        self.final_norm = Norm(config, config.width) if config.norm_placement == "pre" else None

    def readout(self, hidden: jax.Array) -> jax.Array:
        """Returns the model's output for hidden states (B, L, D)."""
        raise NotImplementedError("a subclass says what is read from the hidden states")

    def __call__(
        self,
        tokens: Array | Inputs,
        *,
        mask: Array | None = None,
        token_types: Array | None = None,
        segments: Array | None = None,
        steps: int | None = None,
        grid: Grid | None = None,
        solver: ode.Solver = "euler",
        key: jax.Array | None = None,
        plan: DepthPlan | None = None,
    ) -> jax.Array:
        """Returns `readout(encode(...))`; the arguments are those of `encode`."""
        inputs = as_inputs(tokens, mask, token_types, segments)
        return self.readout(self.encode(tokens=inputs, steps=steps, grid=grid, solver=solver, key=key, plan=plan))

    def encode(
        self,
        tokens: Array | Inputs,
        *,
        mask: Array | None = None,
        token_types: Array | None = None,
        segments: Array | None = None,
        steps: int | None = None,
        grid: Grid | None = None,
        solver: ode.Solver = "euler",
        key: jax.Array | None = None,
        plan: DepthPlan | None = None,
    ) -> jax.Array:
        """Returns the last hidden states (B, L, D).

        Args:
            tokens: int32 (B, L), or an `Inputs` that holds them and all that follows.
            mask: bool (B, L), True at real tokens.
            token_types: int32 (B, L).
            segments: int32 (B, L), non-decreasing along a row: the index of the document that a token belongs to, where
                a row packs several. A token attends only to its own document, and positions start at 0 in each.
            steps, grid, solver: as in `plan`.
            key: a JAX key that turns dropout on.
            plan: the result of `self.plan(...)`, in place of steps, grid and solver: everything that depends on time
                only, computed once and reused.
        """
        plan = self._plan(steps, grid, solver) if plan is None else plan
        return self._run(as_inputs(tokens, mask, token_types, segments), plan, key)[0]

    def run(
        self, inputs: Inputs, plan: DepthPlan, *, key: jax.Array | None = None, memory: Memory | None = None
    ) -> tuple[jax.Array, Memory | None]:
        """Returns the last hidden states (B, L, D) and the memory with these positions added.

        With a `memory` of this plan (`self.memory`) the inputs are the positions after those that it holds. In traced
        code its length is unknown, so the caller must stop when the memory is full.
        """
        return self._run(inputs, plan, key, memory)

    # A call of the model uses private versions of `run` and `plan`: `nnx.tabulate` shows the inputs and outputs of
    # public methods, and cannot show a tuple of dataclasses.

    def _run(
        self, inputs: Inputs, plan: DepthPlan, key: jax.Array | None, memory: Memory | None = None
    ) -> tuple[jax.Array, Memory | None]:
        inputs = inputs.checked(self.config)
        if memory is not None:
            self._check_memory(inputs, plan, memory)
        inputs, view, memory = see(inputs, self.config, memory)
        h, blocks = self._start(inputs, key), []
        fields = self._on_plan(plan, view, key, carried=memory is None)
        kept = self._shared_keys(h) if memory is None else memory.blocks
        for number, (field, part, part_memory) in enumerate(zip(fields, plan, kept, strict=True)):
            h = self._into_lanes(h, number)
            if part.solver is not None:
                h = ode.follow_diffrax(field, h, part)
            else:
                h, part_memory = ode.follow(field, h, _with_keys(part, field.key), part_memory)
            h = self._out_of_lanes(h, number)
            blocks.append(part_memory)
        if memory is not None:
            memory = dataclasses.replace(memory, blocks=tuple(blocks))
        return self._end(h), memory

    def plan(
        self,
        *,
        steps: int | None = None,
        grid: Grid | None = None,
        solver: ode.Solver = "euler",
        unroll: int | bool = 1,
        remat: str | None = None,
        integrator: str = "scan",
    ) -> DepthPlan:
        """Returns how the depth is crossed, with all that depends on time computed: a pytree for `encode` and `run`.

        Args:
            steps: the number of equal steps over the core (a multiple of the groups); None is full depth, unit steps.
            grid: or any increasing times from 0 to `config.core` that contain the group boundaries, (N + 1,). The
                values of a traced grid are unknown, so it is cut into equal shares: each group gets N / groups steps.
            solver: a name in `odelm.ode.SOLVERS` or a Diffrax solver. For a post-norm model "euler" is the
                projected step; any other solver integrates `Block(h) - h`, which is stiff: for study.
            unroll, remat: as in `odelm.ode.integrate`.
            integrator: "scan", or "diffrax" for `diffrax.diffeqsolve`, which is slower and takes any Diffrax solver.
        """
        return self._plan(steps, grid, solver, unroll, remat, integrator)

    def _plan(
        self,
        steps: int | None,
        grid: Grid | None,
        solver: ode.Solver,
        unroll: int | bool = 1,
        remat: str | None = None,
        integrator: str = "scan",
    ) -> DepthPlan:
        if integrator not in INTEGRATORS:
            raise InputError(f"integrator is {integrator!r}; {nearest(integrator, INTEGRATORS)}")
        if (span := self.config.kv_span) > 1 and (integrator != "scan" or not is_own_step(ode.get_solver(solver))):
            raise InputError(
                f"model.kv_span is {span}: keys and values are shared by Euler's steps along a scan; leave out the "
                "solver and the integrator"
            )
        grids = stretches(self.config, steps, grid)
        parts = []
        for field, times, core in zip(self._fields(), grids, self._is_core(), strict=True):
            if integrator == "diffrax" and core:
                parts.append(ode.make_diffrax_plan(field, times, solver=solver))
            else:
                chosen = solver if core else "euler"
                parts.append(ode.make_plan(field, times, solver=chosen, unroll=unroll, remat=remat))
        return tuple(parts)

    def encode_adaptive(
        self,
        tokens: Array | Inputs,
        *,
        tolerance: float,
        mask: Array | None = None,
        token_types: Array | None = None,
        segments: Array | None = None,
        solver: ode.Solver = "bosh3",
        max_steps: int = 256,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns hidden states (B, L, D) and the number of block evaluations; `tolerance` sets the core's steps."""
        if self.config.kv_span > 1:
            raise InputError(f"model.kv_span is {self.config.kv_span}: it takes given steps, and none of a tolerance")
        inputs = as_inputs(tokens, mask, token_types, segments).checked(self.config)
        inputs, view, _ = see(inputs, self.config, None)
        h, evaluations = self._start(inputs, None), jnp.int32(0)
        boundaries = ode.grid.boundaries(self.config.core, self.config.groups)
        spans = with_ends(self.config, ode.grid.cut(boundaries, boundaries))
        fields = zip(self._fields(view), spans, self._is_core(), strict=True)
        for number, (field, (t0, t1), core) in enumerate(fields):
            h = self._into_lanes(h, number)
            if core:
                h, count = ode.integrate_adaptive(
                    field, h, float(t0), float(t1), tolerance=tolerance, solver=solver, max_steps=max_steps
                )
            else:
                h, count = ode.integrate(field, h, [t0, t1]), 1
            h = self._out_of_lanes(h, number)
            evaluations += count
        return self._end(h), evaluations

    def memory(self, plan: DepthPlan, *, batch: int, room: int, window: int | None = None) -> Memory:
        """Returns an empty memory for `run`: `room` positions of `batch` rows at every (step, stage) of the plan; with
        a `window`, a ring in which each position sees only so many, its own included (`odelm.models.memory.Memory`)."""
        _check_scanned(plan)
        check_memory(self.config, room, window)
        kept = (empty_keys(self.config, times.shape, (batch, room)) for times in self.memory_times(plan))
        return empty_memory(tuple(kept), (batch, room), window)

    def memory_times(self, plan: DepthPlan) -> tuple[jax.Array, ...]:
        """Returns the times of the keys and values that a memory of a plan holds, for each block float32 (N, R); with
        `kv_span` these are fewer than those of the plan."""
        parts = zip(plan, self._is_core(), strict=True)
        return tuple(kept_times(part, self.config) if core else part.times for part, core in parts)

    def _shared_keys(self, h: jax.Array) -> tuple[Any, ...]:
        """Returns what blocks carry along the depth without a memory: with `kv_span` the core's newest keys, values."""
        if self.config.kv_span == 1:
            return (None,) * len(self._is_core())
        return tuple(carried_keys(self.config, h) if core else None for core in self._is_core())

    def _check_memory(self, inputs: Inputs, plan: DepthPlan, memory: Memory) -> None:
        if self.config.kind != "decoder":
            raise InputError("a memory is of a decoder: in an encoder earlier positions see the later ones")
        _check_scanned(plan)
        memory.check_room(*inputs.shape)

    def _start(self, inputs: Inputs, key: jax.Array | None) -> jax.Array:
        key = None if key is None else jax.random.fold_in(key, self.config.groups)
        return self.embed(inputs=inputs, key=key).astype(state_dtype(self.config))

    def _end(self, h: jax.Array) -> jax.Array:
        return h if self.final_norm is None else self.final_norm(h)

    def _into_lanes(self, h: jax.Array, number: int) -> jax.Array:
        """Returns the state that block `number` starts from: in lanes where the core begins."""
        return split(h, self.config.lanes) if self.config.lanes > 1 and number == len(self.prelude) else h

    def _out_of_lanes(self, h: jax.Array, number: int) -> jax.Array:
        """Returns the state after block `number`: the mean of the lanes where the core ends."""
        return joined(h) if self.config.lanes > 1 and number + 1 == len(self.prelude) + len(self.blocks) else h

    def _fields(self, view: View | None = None, key: jax.Array | None = None) -> list[BlockField]:
        """Returns the field of every block in turn. The groups' dropout keys come first, so that a model without
        prelude and coda draws what it always did."""
        groups, ends = len(self.blocks), len(self.prelude)
        numbers = [*range(groups + 1, groups + 1 + ends), *range(groups)]
        numbers += range(groups + 1 + ends, groups + 1 + ends + len(self.coda))
        keys = [None if key is None else jax.random.fold_in(key, n) for n in numbers]
        blocks = zip((*self.prelude, *self.blocks, *self.coda), keys, strict=True)
        return [BlockField(block, view, its_key) for block, its_key in blocks]

    def _on_plan(
        self, plan: DepthPlan, view: View | None = None, key: jax.Array | None = None, *, carried: bool = True
    ) -> list[BlockField]:
        """Returns the fields of `_fields` with a plan's sharing of keys and values, only the newest if `carried`."""
        fields, span = self._fields(view, key), self.config.kv_span
        if span == 1:
            return fields
        parts = zip(plan, self._is_core(), strict=True)
        shared = [sharing_of(part, span, carried=carried) if core else None for part, core in parts]
        return [dataclasses.replace(field, sharing=of) for field, of in zip(fields, shared, strict=True)]

    def _is_core(self) -> list[bool]:
        """Returns for every block in turn whether it belongs to the core."""
        return [False] * len(self.prelude) + [True] * len(self.blocks) + [False] * len(self.coda)


def _check_scanned(plan: DepthPlan) -> None:
    if any(part.solver is not None for part in plan):
        raise InputError("a memory needs integrator='scan': Diffrax evaluates the block where it chooses to")


def _with_keys(plan: ode.Plan, key: jax.Array | None) -> ode.Plan:
    """Returns the plan of a block with the dropout keys of its times."""
    if key is None:
        return plan
    keys = jax.vmap(jax.vmap(lambda t: key_at(key, t)))(plan.times)
    return dataclasses.replace(plan, conditions=(plan.conditions[0], keys))

"""Embed, integrate over depth, normalise: what the language models and the classifier have in common."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from odelm import ode
from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.models.block import BlockChain, SharedBlock
from odelm.models.embed import Embed
from odelm.models.field import BlockField
from odelm.models.norm import Norm
from odelm.models.packing import Packing
from odelm.models.precision import residual_dtype

Grid = Sequence[float] | np.ndarray | jax.Array
DepthPlan = tuple[ode.Plan, ...]


class SharedTransformer(nnx.Module):
    """A Transformer whose depth is an interval of time, crossed by `groups` shared blocks in turn.

    Subclasses add `readout(hidden)`; calling the model is `readout(encode(tokens))`. Inputs are int32 tokens
    (B, L), and optionally a bool mask (B, L), True at real tokens, and int32 token types (B, L).

    A row may pack several documents: int32 `segments` (B, L), non-decreasing along a row, say which of them a token is
    of. A token then attends to its own document alone, and positions start at 0 in each.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = dataclasses.replace(config.validate())
        self.embed = Embed(self.config, rngs=rngs)
        block = SharedBlock if config.inner_blocks == 1 else BlockChain
        starts = ode.grid.boundaries(config.depth, config.groups)[:-1]
        self.blocks = nnx.List([block(self.config, start=float(start), rngs=rngs) for start in starts])
        self.final_norm = Norm(self.config, config.width) if config.norm_placement == "pre" else None

    def readout(self, hidden: jax.Array) -> jax.Array:
        """Returns the model's output for hidden states (B, L, D)."""
        raise NotImplementedError("a subclass says what is read from the hidden states")

    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        segments: jax.Array | None = None,
        steps: int | None = None,
        grid: Grid | None = None,
        solver: ode.Solver = "euler",
        key: jax.Array | None = None,
        plan: DepthPlan | None = None,
        unroll: int | bool = 1,
        remat: str | None = None,
    ) -> jax.Array:
        """Returns `readout(encode(...))`; the arguments are those of `encode`."""
        return self.readout(
            self.encode(
                tokens,
                mask=mask,
                token_types=token_types,
                segments=segments,
                steps=steps,
                grid=grid,
                solver=solver,
                key=key,
                plan=plan,
                unroll=unroll,
                remat=remat,
            )
        )

    def encode(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        segments: jax.Array | None = None,
        steps: int | None = None,
        grid: Grid | None = None,
        solver: ode.Solver = "euler",
        key: jax.Array | None = None,
        plan: DepthPlan | None = None,
        unroll: int | bool = 1,
        remat: str | None = None,
    ) -> jax.Array:
        """Returns the last hidden states (B, L, D).

        Args:
            steps: so many equal steps (spread evenly over the groups); None is full depth, unit steps.
            grid: or any increasing times from 0 to depth that contain the group boundaries, (N + 1,). The values of
                a traced grid are not known, so it is cut into equal shares: each group gets N / groups of its steps.
            solver: a name in `odelm.ode.SOLVERS` or a Diffrax solver. For a post-norm model "euler" is the
                projected step; any other solver integrates `Block(h) - h`, which is stiff: for study.
            key: a JAX key that turns dropout on.
            plan: the result of `self.plan(...)`, in place of steps, grid and solver: what depends on time
                alone, computed once and kept from call to call.
            unroll, remat: as in `odelm.ode.integrate`.
        """
        if plan is None:
            plan = self.plan(steps=steps, grid=grid, solver=solver, key=key)
        packing = self._packing(tokens, segments)
        h = self._embedded(tokens, token_types, key, packing)
        for field, part in zip(self._fields(mask, key, packing), plan, strict=True):
            h = ode.follow(field, h, part, unroll=unroll, remat=remat)
        return h if self.final_norm is None else self.final_norm(h)

    def encode_adaptive(
        self,
        tokens: jax.Array,
        *,
        tolerance: float,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        segments: jax.Array | None = None,
        solver: ode.Solver = "bosh3",
        max_steps: int = 256,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns hidden states (B, L, D) and the number of block evaluations, with steps chosen by tolerance."""
        packing = self._packing(tokens, segments)
        h = self._embedded(tokens, token_types, None, packing)
        times = ode.grid.boundaries(self.config.depth, self.config.groups)
        evaluations = jnp.int32(0)
        for field, t0, t1 in zip(self._fields(mask, None, packing), times[:-1], times[1:], strict=True):
            h, count = ode.integrate_adaptive(
                field, h, float(t0), float(t1), tolerance=tolerance, solver=solver, max_steps=max_steps
            )
            evaluations += count
        return h if self.final_norm is None else self.final_norm(h), evaluations

    def plan(
        self,
        *,
        steps: int | None = None,
        grid: Grid | None = None,
        solver: ode.Solver = "euler",
        key: jax.Array | None = None,
    ) -> DepthPlan:
        """Returns, for each group, its step sizes and what its block knows of each time: a pytree for `encode`."""
        if solver == "euler" and self.config.norm_placement == "post":
            solver = "projected_euler"
        grids = self._grids(steps, grid)
        fields = self._fields(None, key)
        return tuple(ode.plan(field, part, solver=solver) for field, part in zip(fields, grids, strict=True))

    def _packing(self, tokens: jax.Array, segments: jax.Array | None) -> Packing | None:
        if segments is None:
            return None
        if segments.shape != tokens.shape:
            raise InputError(
                f"the segments are of shape {segments.shape}, expected one for each token, {tokens.shape}: "
                "give a row of segments for each row of tokens"
            )
        return Packing.of(segments, self.config)

    def _embedded(
        self,
        tokens: jax.Array,
        token_types: jax.Array | None,
        key: jax.Array | None,
        packing: Packing | None = None,
    ) -> jax.Array:
        length, longest = tokens.shape[1], self.config.max_length
        if length > longest:
            raise InputError(
                f"the tokens are {length} long, but model.max_length is {longest}: shorten them or raise it"
            )
        if token_types is not None and not self.config.token_types:
            raise InputError("token_types were given, but model.token_types is 0: the model has no embeddings for them")
        key = None if key is None else jax.random.fold_in(key, self.config.groups)
        return self.embed(tokens, token_types, key, packing and packing.positions).astype(residual_dtype(self.config))

    def _fields(
        self, mask: jax.Array | None, key: jax.Array | None, packing: Packing | None = None
    ) -> list[BlockField]:
        keys = [None if key is None else jax.random.fold_in(key, g) for g in range(len(self.blocks))]
        return [BlockField(block, mask, k, packing) for block, k in zip(self.blocks, keys, strict=True)]

    def _grids(self, steps: int | None, grid: Grid | None) -> list[Grid]:
        """Cuts the requested grid at the group boundaries. A traced grid is cut into equal shares."""
        depth, groups = self.config.depth, self.config.groups
        if steps is not None and grid is not None:
            raise InputError(f"both steps={steps} and a grid were given; give one")
        if grid is None:
            steps = depth if steps is None else steps
            if steps < 1 or steps % groups:
                raise InputError(
                    f"steps is {steps}, which does not spread evenly over the model's {groups} groups; "
                    f"try {max(groups, round(steps / groups) * groups)}"
                    + (", or share its layers first (init.groups)" if groups == depth > 1 else "")
                )
            grid = ode.grid.equal(depth, steps)
        elif not isinstance(grid, Tracer):
            grid = ode.grid.checked(np.asarray(grid), depth, groups)
            cuts = np.searchsorted(grid, ode.grid.boundaries(depth, groups))
            return [grid[start : stop + 1] for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
        share, rest = divmod(len(grid) - 1, groups)
        if rest:
            raise InputError(
                f"a traced grid has {len(grid) - 1} steps, which are no equal shares of the model's {groups} groups; "
                f"give a multiple of {groups}, or a grid of known values"
            )
        return [grid[g * share : (g + 1) * share + 1] for g in range(groups)]

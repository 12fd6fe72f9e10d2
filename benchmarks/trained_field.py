"""What a trained field looks like along the depth, and how solvers converge to its solution.

    python -m benchmarks.trained_field --workdir=runs/tiny

Of held-out rows of a run, at full depth: the norm of the state and of the field; how much the field changes from one
unit of the core to the next (the second difference of the state, as a share of the field); and the loss if the core
ended after so many units (the logit lens, nostalgebraist 2020). Then the distance between the final state of n equal
steps and that of eight times full depth, relative to the latter, for Euler's method and Heun's: its fall from twice
full depth to four times gives the observed order. Prelude and coda are part of the path, but only the core is refined.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import odelm
from benchmarks import run_program
from odelm.data.loader import eval_batches
from odelm.data.prepare import prepare
from odelm.infer.runner import Runner, with_options
from odelm.models.along_depth import norms_along_depth
from odelm.models.loss import inputs_of, sums_from_hidden
from odelm.models.stretches import in_one_shape
from odelm.run_directory import TOKENIZER

ROWS = 8
FINER = 8
"""The reference has so many steps for each unit of the core."""


def field_of(workdir: str | Path) -> dict[str, Any]:
    """Returns the figures of a run, as plain numbers."""
    loaded, config, _ = odelm.load(workdir)
    model: Any = with_options(loaded, dtype="float32")
    prepared = prepare(config, tokenizer_file=Path(workdir) / TOKENIZER)
    batch = next(iter(eval_batches(prepared, config, batch_size=ROWS)))
    graph, params = nnx.split(model)
    core, found = model.config.core, {}

    @jax.jit
    def along(params: Any) -> tuple[jax.Array, jax.Array]:
        return norms_along_depth(nnx.merge(graph, params), inputs_of(batch))

    if model.config.lanes == 1:
        states, slopes = along(params)
        found |= {"state_norms": _plain(states), "field_norms": _plain(slopes)}
    if model.config.groups == 1:
        found |= _refined(model, batch)
        if model.config.lanes == 1:
            found["second_differences"] = _plain(jax.jit(_second_differences, static_argnums=0)(graph, params, batch))
        if model.config.norm_placement == "pre":
            found["lens"] = _lens(graph, params, batch, core)
    return found


def _second_differences(graph: Any, params: Any, batch: Any) -> jax.Array:
    """Returns the change of the field from each unit of the core to the next, as a share of the field there."""
    model = nnx.merge(graph, params)
    h = model.embed(inputs_of(batch))
    for block in model.prelude:
        h = block(h, jnp.float32(0))

    def unit(h: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        after = model.blocks[0](h, t)
        return after, (after - h).astype(jnp.float32)

    _, slopes = jax.lax.scan(unit, h, jnp.arange(model.config.core, dtype=jnp.float32))
    changes, later = (jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3))) for x in (jnp.diff(slopes, axis=0), slopes[1:]))
    return changes / later


def _refined(model: Any, batch: Any) -> dict[str, Any]:
    """Returns the distances to the reference by solver and steps, and the observed orders between the last two."""
    core, runner = model.config.core, Runner.of(model)
    counts = sorted({max(core // 4, 1), max(core // 2, 1), core, 2 * core, 4 * core})

    @jax.jit
    def final(params: Any, plan: Any) -> jax.Array:
        return nnx.merge(runner.graph, params).encode(inputs_of(batch), plan=plan)

    def finals(solver: str, steps: list[int]) -> list[jax.Array]:
        plans = in_one_shape([runner.plan(n, solver) for n in steps])  # one program for all of a solver
        return [final(runner.params, plan) for plan in plans]

    *heun, exact = finals("heun", [*counts, FINER * core])
    ends = {"euler": finals("euler", counts)}
    if model.config.norm_placement == "pre":
        ends["heun"] = heun
    distances = {
        solver: {
            str(n): float(jnp.linalg.norm(end - exact) / jnp.linalg.norm(exact))
            for n, end in zip(counts, of_solver, strict=True)
        }
        for solver, of_solver in ends.items()
    }
    last = [str(n) for n in counts[-2:]]
    orders = {solver: math.log2(found[last[0]] / found[last[1]]) for solver, found in distances.items()}
    return {"distances": distances, "observed_orders": orders}


def _lens(graph: Any, params: Any, batch: Any, core: int) -> list[float]:
    """Returns the loss if the depth ended after so many units of the core, before the coda, 0 to all of them."""

    @jax.jit
    def loss(params: Any, plan: Any) -> jax.Array:
        model = nnx.merge(graph, params)
        sums = sums_from_hidden(model, model.encode(inputs_of(batch), plan=plan), batch)
        return sums.nats / sums.tokens

    model = nnx.merge(graph, params)
    parts, at = Runner.of(model).plan(core, "euler"), model.config.prelude
    losses = []
    for units in range(core + 1):
        # Steps of size zero leave the state as it is.
        sizes = jnp.where(jnp.arange(core) < units, parts[at].sizes, 0.0)
        losses.append(float(loss(params, (*parts[:at], dataclasses.replace(parts[at], sizes=sizes), *parts[at + 1 :]))))
    return losses


def _plain(values: Any) -> list[float]:
    return [float(value) for value in np.asarray(values)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    print(json.dumps(field_of(parser.parse_args().workdir), indent=1))


if __name__ == "__main__":
    run_program(main)

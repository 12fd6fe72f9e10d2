"""What early exits by row cost and save: a pass in a narrowing batch against a plain one, in turns.

    python -m benchmarks.exits --model=small-decoder --size=32x512,128x512 --tolerance=0.1,0.2

Rows of random tokens cross the depth, in bfloat16 if nothing else is said. For each tolerance it prints the mean of the
evaluations that rows took, and the time beside that of all steps, with the batch whole, and cut in two and four parts
(`odelm.infer.narrowing`).
"""

import argparse
import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import odelm
from benchmarks import run_program
from benchmarks.options import positive, several, size, whole
from odelm.infer import latency
from odelm.infer.narrowing import encode_narrowing
from odelm.infer.runner import Runner, with_dtype
from odelm.models import Inputs

PARTS = 1, 2, 4


def programs_of(runner: Runner, plan: Any, tolerances: list[float]) -> dict[str, Any]:
    """Returns the compiled passes `(params, tokens) -> (hidden states, evaluations)`, by what they are."""

    def plain(params: Any, tokens: jax.Array) -> tuple[jax.Array, int]:
        return nnx.merge(runner.graph, params).encode(Inputs(tokens), plan=plan), sum(part.evaluations for part in plan)

    def leaving(params: Any, tokens: jax.Array, rule: odelm.EarlyExit, parts: int) -> Any:
        return encode_narrowing(nnx.merge(runner.graph, params), Inputs(tokens), plan, rule, parts=parts)

    found: dict[str, Any] = {"all steps": jax.jit(plain)}
    for tolerance, parts in itertools.product(tolerances, PARTS):
        rule = odelm.EarlyExit(tolerance)
        found[f"exit {tolerance:g}, {parts} parts"] = jax.jit(partial(leaving, rule=rule, parts=parts))
    return found


def measure(programs: dict[str, Any], params: Any, tokens: jax.Array, repeats: int) -> dict[str, dict[str, float]]:
    """Returns the milliseconds of each pass, their median and 90th percentile, and the mean of a row's evaluations."""
    calls = {name: partial(program, params, tokens) for name, program in programs.items()}
    times = latency.measure(calls, repeats=repeats)
    evaluations = {name: float(np.mean(call()[1])) for name, call in calls.items()}
    return {name: dataclasses.asdict(times[name]) | {"evaluations": evaluations[name]} for name in calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small-decoder", help="a run, a folder, a name")
    parser.add_argument("--size", type=several(size), default="32x512", help="batch x length, several as A,B")
    parser.add_argument("--tolerance", type=several(positive), default="0.2", help="A,B")
    parser.add_argument("--steps", type=int, help="default: full depth")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=whole, default=9)
    parser.add_argument("--out", type=Path, help="a file for all times, as JSON")
    options = parser.parse_args()
    model, *_ = odelm.load(options.model)
    runner, results = Runner.of(with_dtype(model, options.dtype)), {}
    plan = runner.plan(options.steps or model.config.core, "euler")
    print(f"{options.model} on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for shape in options.size:
        tokens = jax.random.randint(jax.random.key(0), shape, 0, model.config.vocab_size)
        programs = programs_of(runner, plan, options.tolerance)
        found = results[str(shape)] = measure(programs, runner.params, tokens, options.repeats)
        all_steps = found["all steps"]["median"]
        for name, one in found.items():
            print(
                f"  {shape} {name:24} {one['median']:8.2f} ms (p90 {one['p90']:.2f}), "
                f"{all_steps / one['median']:.2f}x, {one['evaluations']:.2f} evaluations", flush=True,
            )  # fmt: skip
        if options.out:
            options.out.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    run_program(main)

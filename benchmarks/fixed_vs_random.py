"""Trains the demo's model with fixed and with random steps for equal wall-clock, and prints both curves.

    python -m benchmarks.fixed_vs_random [--seconds=150] [--out=FILE.json]

The two trainings take turns, a few seconds each, so that both meet the same noise of a shared machine; the
learning rate of each decays over its own share of the time. Compilation and evaluation are not counted.
"""

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import run_program
from benchmarks.options import whole
from benchmarks.variants import PLAIN
from odelm import sharding
from odelm.config import Config, StepSamplingConfig, load_recipe, replace
from odelm.data.loader import eval_batches, train_batches
from odelm.data.prepare import prepare
from odelm.models.loss import mean_loss
from odelm.ode import grid
from odelm.train.draws import draw_grid
from odelm.train.evaluate import make_loss
from odelm.train.step import compile_updates, graph_of, init_state, make_update

TURN = 5.0
EVALUATED = (12, 6, 4, 3)


def optimizer_by_time(config: Config) -> optax.GradientTransformation:
    """AdamW as in the demo, with its learning rate taken from a hyperparameter that the clock sets."""
    o = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.inject_hyperparams(optax.adamw, static_args=("b1", "b2", "eps", "weight_decay"))(
            learning_rate=o.learning_rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay
        ),
    )


class Run:
    """One training, advanced in turns."""

    def __init__(self, name: str, config: Config, seconds: float):
        self.name, self.config, self.seconds = name, config, seconds
        mesh = sharding.make_mesh(config.mesh)
        self.prepared = prepare(config)
        graph, _ = graph_of(config)
        optimizer = optimizer_by_time(config)
        self.state = init_state(config, optimizer, mesh)
        self.batches = (sharding.place_batch(b, mesh) for b in train_batches(self.prepared, config))
        first = next(self.batches)
        self.batches = itertools.chain([first], self.batches)
        counts = config.trained_counts
        update = make_update(config, graph, optimizer)
        self.updates = compile_updates(update, self.state, first, counts, mesh, lambda line: print(f"{name}: {line}"))
        self.loss = make_loss(graph)
        self.held_out = list(eval_batches(self.prepared, config, limit=config.train.eval_batches))
        self.spent, self.step, self.curve = 0.0, 0, []

    def turn(self) -> None:
        """Trains for TURN seconds of its own clock."""
        end = min(self.spent + TURN, self.seconds)
        while self.spent < end:
            start = time.perf_counter()
            self._set_rate()
            times = draw_grid(self.config, self.step)
            self.state, metrics = self.updates[len(times) - 1](self.state, next(self.batches), times)
            jax.block_until_ready(metrics)
            self.step += 1
            self.spent += time.perf_counter() - start

    def evaluate(self) -> None:
        depth = self.config.model.depth
        losses = {}
        for n in EVALUATED:
            times = jnp.asarray(grid.equal(depth, n))
            losses[n] = mean_loss([self.loss(self.state.params, batch, times) for batch in self.held_out]).loss
        self.curve.append({"seconds": self.spent, "updates": self.step, "loss": losses})
        shown = "  ".join(f"{n}: {loss:.4f}" for n, loss in losses.items())
        print(f"{self.name:7} {self.spent:6.1f} s  {self.step:5} updates  {shown}", flush=True)

    def _set_rate(self) -> None:
        o, share = self.config.optimizer, self.spent / self.seconds
        decayed = o.final_fraction + (1 - o.final_fraction) * (1 + np.cos(np.pi * min(share, 1.0))) / 2
        rate = o.learning_rate * min(decayed, (self.step + 1) / o.warmup)
        adamw = self.state.optimizer[1]  # pyright: ignore
        adamw.hyperparams["learning_rate"] = jnp.float32(rate)  # pyright: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="training time of each, in seconds")
    parser.add_argument("--evaluations", type=whole, default=3)
    parser.add_argument("--out", type=Path, help="write the curves as JSON")
    arguments = parser.parse_args()
    # The demo's model, with AdamW and all counts from the start: only the steps differ.
    config = replace(load_recipe("tiny"), PLAIN).validate()
    fixed = dataclasses.replace(config, step_sampling=StepSamplingConfig(kind="fixed"))
    runs = [Run("fixed", fixed, arguments.seconds), Run("random", config, arguments.seconds)]
    print("held-out loss (nats/token) by number of steps")
    for mark in np.linspace(0, arguments.seconds, arguments.evaluations + 1)[1:]:
        while min(run.spent for run in runs) < mark:
            for run in runs:
                if run.spent < mark:
                    run.turn()
        for run in runs:
            run.evaluate()
    if arguments.out:
        arguments.out.write_text(json.dumps({run.name: run.curve for run in runs}, indent=2) + "\n")
    last = {run.name: run.curve[-1]["loss"] for run in runs}
    for n in (12, 3):
        print(f"{n:2} steps: random {last['random'][n]:.4f}, fixed {last['fixed'][n]:.4f}")


if __name__ == "__main__":
    run_program(main)

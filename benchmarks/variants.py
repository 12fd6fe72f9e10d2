"""Trains a list of recipes for equal time, with tuned rates and several seeds, and prints what each reached.

    python -m benchmarks.variants [--config=tiny] [--seconds=60] [--seeds=2] [--variants="base;muon"] [--out=FILE.json]

A recipe is a base with some options changed (`VARIANTS`). The updates of each are timed in turns with those of the
base, so that both meet the same noise; a recipe then gets as many updates as fit into the time by these medians, with
the counts that it draws. Compilation and evaluation are not counted. Each recipe's learning rates are tried at
every factor of `--rates` with the first seed, and beyond them while the best is the largest or the smallest. It is used
for the other seeds; reported are the mean over all seeds and their range. With `--out` a call resumes an earlier one.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import run_program
from benchmarks.options import one_of, positive, several, whole
from odelm import sharding
from odelm.config import Config, load_recipe, replace
from odelm.data.loader import held_out_rows, train_batches
from odelm.data.prepare import Prepared, prepare
from odelm.models.loss import mean_loss
from odelm.ode import grid
from odelm.programs.command_line import overridden, use_compilation_cache
from odelm.train.draws import draw_grid
from odelm.train.evaluate import make_loss
from odelm.train.optimizer import make_optimizer, schedule
from odelm.train.step import TrainState, compile_updates, graph_of, init_state, make_update

Options = dict[str, Any]

PLAIN: Options = {
    "optimizer.kind": "adamw",
    "optimizer.learning_rate": 6e-3,
    "optimizer.muon_learning_rate": 0.02,
    "step_sampling.few_first": 0.0,
    "model.parallel_branches": False,
}
"""What the base is, whatever the recipe has of it."""
MUON: Options = {"optimizer.kind": "muon"}
FEW_FIRST: Options = {"step_sampling.few_first": 0.4}
STABLE: Options = {"optimizer.decay": "stable", "optimizer.decay_share": 0.4}
ENDS: Options = {"model.prelude": 1, "model.coda": 1}
ALL: Options = MUON | ENDS | {"model.wide_modulation": True, "model.parallel_branches": True}
UNSHARED: Options = {"model.time_modulation": False, "step_sampling.kind": "fixed"}

VARIANTS: dict[str, Options] = {
    "base": {},
    "fixed steps": {"step_sampling.kind": "fixed"},
    "unshared": UNSHARED,
    "unshared, muon": UNSHARED | MUON,
    "muon": MUON,
    "muon, wide": MUON | {"model.wide_modulation": True},
    "muon, parallel": MUON | {"model.parallel_branches": True},
    "muon, lanes": MUON | {"model.lanes": 2},
    "muon, rank 8": MUON | {"model.layer_rank": 8},
    "muon, few first": MUON | FEW_FIRST,
    "muon, few first, fine last": MUON | FEW_FIRST | {"step_sampling.fine_last": 0.2},
    "muon, few first, parallel": MUON | FEW_FIRST | {"model.parallel_branches": True},
    "muon, few first, lanes": MUON | FEW_FIRST | {"model.lanes": 2},
    "muon, few first, parallel, lanes": MUON | FEW_FIRST | {"model.parallel_branches": True, "model.lanes": 2},
    "muon, few first, stable": MUON | FEW_FIRST | STABLE,
    "muon, few first, parallel, stable": MUON | FEW_FIRST | STABLE | {"model.parallel_branches": True},
    "muon, distilled": MUON | {"train.distill": 0.5, "train.distill_from": 0.7},
    "muon, averaged": MUON | {"optimizer.average": 0.98},
    "muon, stable": MUON | STABLE,
    "muon, ends": MUON | ENDS,
    "muon, ends, lanes": MUON | ENDS | {"model.lanes": 2},
    "all": ALL,
    "all, few first": ALL | FEW_FIRST,
    "all, lanes": ALL | {"model.lanes": 2},
}
"""What is changed in the plain base. `unshared` has a block for each layer. `all` is what paid in an earlier trial."""


class Rated(NamedTuple):
    """The state of an optimiser whose updates, made at the peak of its rates, are multiplied by `rate`."""

    inner: Any
    rate: jax.Array


def rated(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimiser with a rate in its state: one executable then serves every rate and schedule."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Rated]:
        updates, inner = optimizer.update(updates, state.inner, params)
        return jax.tree.map(lambda leaf: state.rate * leaf, updates), Rated(inner, state.rate)

    return optax.GradientTransformation(lambda params: Rated(optimizer.init(params), jnp.float32(1)), update)


def config_of(name: str, base: Config) -> Config:
    """Returns the recipe of a variant."""
    options = dict(VARIANTS[name])
    if name.startswith("unshared"):
        options["model.groups"] = base.model.depth
    return replace(base, PLAIN | options)


class Variant:
    """One recipe: its compiled updates and losses, what they take, and its trainings."""

    def __init__(self, name: str, config: Config, prepared: Prepared):
        self.name, self.config, self.prepared = name, config.validate(), prepared
        self.mesh = sharding.make_mesh(self.config.mesh)
        self.loss = make_loss(graph_of(self.config)[0])
        self.seconds: dict[tuple[int, bool], list[float]] = {}
        self.timed: TrainState | None = None
        self.reference: dict[tuple[int, bool], float] | None = None
        self.compile()

    @property
    def counts(self) -> tuple[int, ...]:
        return self.config.trained_counts

    def compile(self) -> None:
        """Compiles the updates; those that know the number of updates have to be compiled again if it changes."""
        graph, parts = graph_of(self.config)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(parts))
        constant = dataclasses.replace(self.config.optimizer, decay="constant", warmup=0)
        self.optimizer = rated(make_optimizer(constant, 1, self.config.model))
        state = init_state(self.config, self.optimizer, self.mesh)
        self.batch = sharding.place_batch(next(iter(train_batches(self.prepared, self.config))), self.mesh)
        update = make_update(self.config, graph, self.optimizer)
        self.updates = compile_updates(update, state, self.batch, self.counts, self.mesh, lambda _: None)

    def measure(self) -> None:
        """Times each update once more, early and late in a training."""
        for late in (False, True):
            step = self.config.train.updates if late else 0
            state = dataclasses.replace(self.timed or self._state(0), step=jnp.int32(step))
            for count in self.counts:
                times = grid.equal(self.config.model.core, count)
                since = time.perf_counter()
                state, metrics = self.updates[count](state, self.batch, times)
                jax.block_until_ready(metrics)
                self.seconds.setdefault((count, late), []).append(time.perf_counter() - since)
            self.timed = state

    def medians(self) -> dict[tuple[int, bool], float]:
        """Returns the median seconds of each update that was timed, early and late."""
        return {key: float(np.median(values)) for key, values in self.seconds.items()}

    def fit(self, seconds: float, medians: dict[tuple[int, bool], float]) -> None:
        """Sets the number of updates to those that fit into the time."""
        updates, config = max(int(seconds / np.mean(list(medians.values()))), 1), self.config
        for _ in range(20):
            config = replace(self.config, {"train.updates": updates})
            late = round(config.train.distill_from * updates) if config.train.distill else updates
            drawn = [len(draw_grid(config, update)) - 1 for update in range(updates)]
            took = sum(medians[count, update >= late] for update, count in enumerate(drawn))
            updates = max(round(updates * seconds / took), 1)
        self.config = config
        if config.train.distill:
            self.compile()

    def train(self, *, seed: int, factor: float) -> Options:
        """Trains once, and returns the held-out losses by evaluations of a block, with the time it took here."""
        config = replace(self.config, {"train.seed": seed})
        state, updates = self._state(seed), config.train.updates
        rate = schedule(dataclasses.replace(config.optimizer, learning_rate=1.0), updates)
        rates = np.asarray(jax.vmap(rate)(jnp.arange(updates)), np.float32)
        batches, since = iter(train_batches(self.prepared, config)), time.perf_counter()
        metrics: Any = None
        for update in range(updates):
            times = draw_grid(config, update)
            optimizer: Any = state.optimizer
            own = optimizer._replace(rate=jnp.float32(factor * rates[update]))
            state = dataclasses.replace(state, optimizer=own)
            batch = sharding.place_batch(next(batches), self.mesh)
            state, metrics = self.updates[len(times) - 1](state, batch, times)
        jax.block_until_ready(metrics)
        took = time.perf_counter() - since
        return {"seed": seed, "factor": factor, "updates": updates, "wall_s": round(took, 1)} | self._losses(state)

    def _losses(self, state: TrainState) -> Options:
        config = self.config
        rows = held_out_rows(self.prepared, config, limit=config.train.eval_batches * config.train.batch_size)
        batches = [sharding.place_batch(batch, self.mesh) for batch in rows.batches(config.train.batch_size)]
        found = {}
        for steps in config.eval_steps if config.model.groups < config.model.core else (config.model.core,):
            times = jnp.asarray(grid.equal(config.model.core, steps))
            mean = mean_loss([self.loss(state.evaluated, batch, times) for batch in batches])
            found[str(config.model.ends + steps)] = mean.loss
        return {"loss": found}

    def _state(self, seed: int) -> TrainState:
        return init_state(replace(self.config, {"train.seed": seed}), self.optimizer, self.mesh)


def time_in_turns(variant: Variant, base: Variant, repeats: int) -> dict[tuple[int, bool], float]:
    """Returns the seconds of each update of a variant, as they are where the base takes what it took at first.

    Both are timed in turns, so often, and a machine that is slower than it was is slower for both.
    """
    for one in (base, variant):
        # The first call loads what it needs.
        one.measure()
        one.seconds.clear()
    for _ in range(repeats):
        base.measure()
        variant.measure()
    now = base.medians()
    base.reference = base.reference or now
    pace = float(np.median([base.reference[key] / now[key] for key in now]))
    return {key: pace * seconds for key, seconds in variant.medians().items()}


def best_of(runs: list[Options]) -> list[Options]:
    """Returns the runs at the factor whose first seed reached the lowest mean over all counts."""
    first = [run for run in runs if run["seed"] == runs[0]["seed"]]
    best = min(first, key=lambda run: float(np.mean(list(run["loss"].values()))))
    return [run for run in runs if run["factor"] == best["factor"]]


def beyond(runs: list[Options]) -> float | None:
    """Returns the factor to try next: twice the largest or half the smallest, if that is the best; None otherwise."""
    tried = sorted({run["factor"] for run in runs if run["seed"] == runs[0]["seed"]})
    best = best_of(runs)[0]["factor"]
    if best == tried[-1]:
        return 2 * best
    return best / 2 if best == tried[0] else None


def wanted(runs: list[Options], factors: list[float], options: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """Yields the seed and factor of each training of a variant; `runs` has those that are done."""
    yield from ((0, factor) for factor in factors)
    for _ in range(options.further):
        if (factor := beyond(runs)) is not None:
            yield 0, factor
    yield from ((seed, best_of(runs)[0]["factor"]) for seed in range(1, options.seeds))


def table(results: dict[str, Options]) -> str:
    """Returns the results as Markdown, the losses by evaluations of a block; ± is half the range over the seeds."""
    counts = sorted({int(count) for result in results.values() for run in result["runs"] for count in run["loss"]})
    lines = [
        "| variant | parameters | updates | rate | " + " | ".join(map(str, reversed(counts))) + " |",
        "|---|---|---|---|" + "---|" * len(counts),
    ]
    for name, result in results.items():
        runs = best_of(result["runs"])
        cells = []
        for count in reversed(counts):
            losses = [run["loss"][str(count)] for run in runs if str(count) in run["loss"]]
            spread = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
            cells.append(f"{np.mean(losses):.3f}{spread}" if losses else "")
        size = f"{result['parameters'] / 1e6:.2f} M"
        lines.append(f"| {name} | {size} | {runs[0]['updates']} | {runs[0]['factor']:g}x | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="the recipe that is the base")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="an option of the base")
    some = several(one_of(VARIANTS), separator=";")
    parser.add_argument("--variants", type=some, default=list(VARIANTS), help=f"A;B, of {', '.join(VARIANTS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time of each, as its updates take it")
    parser.add_argument("--rates", type=several(positive), default="0.5,1,2", help="factors of those of the base")
    parser.add_argument("--further", type=int, default=3, help="at most so many factors beyond these")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--repeats", type=whole, default=5, help="of the timing of each update")
    parser.add_argument("--out", type=Path, help="what is found, as JSON, written after each training")
    options = parser.parse_args()
    use_compilation_cache("~/.cache/odelm/compiled")
    base = overridden(load_recipe(options.config), options.set).validate()
    prepared = prepare(base)
    results: dict[str, Options] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    first = Variant("base", config_of("base", base), prepared)
    for name in options.variants:
        since = time.perf_counter()
        variant = first if name == "base" else Variant(name, config_of(name, base), prepared)
        print(f"{name}: compiled in {time.perf_counter() - since:.0f} s", flush=True)
        variant.fit(options.seconds, time_in_turns(variant, first, options.repeats))
        runs = results.setdefault(variant.name, {"parameters": variant.parameters, "runs": []})["runs"]
        for seed, factor in wanted(runs, options.rates, options):
            if any(run["seed"] == seed and run["factor"] == factor for run in runs):
                continue
            runs.append(variant.train(seed=seed, factor=factor))
            print(f"{variant.name}: {json.dumps(runs[-1])}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    device = jax.devices()[0].device_kind
    print(f"\n{options.seconds:g} s each by the medians of its updates, on {device}, jax {jax.__version__}; "
          f"held-out loss by evaluations of a block\n\n{table({n: results[n] for n in options.variants})}")  # fmt: skip


if __name__ == "__main__":
    run_program(main)

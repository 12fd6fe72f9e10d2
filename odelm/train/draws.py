"""Which depth grid each update of pre-training uses: a pure function of (seed, update), made on the host."""

import numpy as np

from odelm import rng
from odelm.config import Config
from odelm.ode import grid


def draw_grid(config: Config, update: int) -> np.ndarray:
    """Returns the grid of an update, float32 (N + 1,), the same on every process."""
    generator = rng.host(config.train.seed, "steps", update)
    sampling, model = config.step_sampling, config.model
    if sampling.kind == "fixed":
        return grid.equal(model.core, model.core)
    count = grid.draw_count(generator, *_allowed_counts(config, update))
    if sampling.kind == "random_sizes":
        return grid.draw_sizes(generator, model.core, count, low=sampling.low, high=sampling.high, groups=model.groups)
    return grid.draw_equal(generator, model.core, count, jitter=sampling.jitter, groups=model.groups)


def _allowed_counts(config: Config, update: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Returns the counts available at an update, and their weights: all of them where no curriculum applies."""
    counts, weights = config.step_counts, config.step_sampling.weights
    anneal, few = (
        share * config.train.updates for share in (config.step_sampling.anneal, config.step_sampling.few_first)
    )
    fine = config.step_sampling.fine_last
    last = (1 - fine) * config.train.updates if fine else np.inf
    if max(anneal, few) <= update < last:
        return counts, weights
    drawn = [i for i in range(len(counts)) if not weights or weights[i]]
    half = (len(drawn) + 1) // 2
    if update < few:
        chosen = sorted(drawn, key=lambda i: counts[i])[:half]
    elif update < anneal:
        chosen = sorted(drawn, key=lambda i: -counts[i])[: 1 + int(len(drawn) * update / anneal)]
    else:
        chosen = sorted(drawn, key=lambda i: -counts[i])[:half]
    return tuple(counts[i] for i in chosen), tuple(weights[i] for i in chosen) if weights else ()

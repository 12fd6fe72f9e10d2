"""The official metrics of a classifier on the held-out examples of its task, for each way to cross the depth."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from odelm.data.examples import HeldOutExamples
from odelm.evals.sweep import Row, Setting, hidden_of
from odelm.infer.runner import Runner
from odelm.models.early_exit import EarlyExit
from odelm.models.loss import Batch


def add_scores(
    runner: Runner, chosen: Sequence[Setting], rows: Sequence[Row], examples: HeldOutExamples, batches: Sequence[Batch]
) -> None:
    """Adds `metrics`, by name, to the row of each setting, and removes its perplexity, which classes do not have."""
    for setting, row in zip(chosen, rows, strict=True):
        plan = None if setting.steps is None else setting.plan(runner)
        adaptive = setting if plan is None else None
        outputs = [_outputs(runner.graph, adaptive, runner.params, plan, setting.early_exit, data) for data in batches]
        row["metrics"] = examples.scores(np.concatenate([np.asarray(of_batch) for of_batch in outputs]))
        row["perplexity"] = None


@partial(jax.jit, static_argnums=(0, 1))
def _outputs(
    graph: nnx.GraphDef, adaptive: Setting | None, params: Any, plan: Any, rule: EarlyExit | None, data: Batch
) -> jax.Array:
    """Returns the model's outputs for each row, float32 (B, outputs)."""
    model = nnx.merge(graph, params)
    return model.readout(hidden_of(model, adaptive, plan, rule, data)[0])

"""What is measured of a trained row of docs/study.md: its curve, its losses, how smoothly it trained, its scores."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import odelm
from odelm.config import Config, ModelConfig, default_steps
from odelm.errors import InputError
from odelm.evals.compare import Comparison, batches_of
from odelm.evals.likelihood import Scorer
from odelm.evals.tasks.evaluate import evaluate
from odelm.evals.tasks.find import find_tasks
from odelm.evals.tasks.items import SentencePair
from odelm.infer.runner import Runner
from odelm.models.loss import Batch, LossSums, inputs_of, mean_loss, sums_from_hidden
from odelm.models.stretches import evaluations_of, in_one_shape
from odelm.train.health import Losses

Record = dict[str, Any]
EVALUATIONS = (12, 8, 6, 4, 3, 2)
"""Of the blocks, the ends included, at which a row is measured where it can be."""


def records_of(workdir: Path) -> list[Record]:
    """Returns the records of a run."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def curve_of(records: list[Record]) -> list[Record]:
    """Returns the held-out losses of a run against its updates and tokens."""
    tokens, curve = 0, []
    for record in records:
        if "tokens_per_s" in record:
            tokens = record["tokens"]
        if "eval_loss" in record:
            curve.append({"update": record["step"], "tokens": tokens, "losses": record["eval_loss"]})
    return curve


def stability_of(records: list[Record]) -> Record:
    """Returns how many updates of a run were skipped because they were not finite, how often its loss jumped
    (`odelm.train.health`), and the largest norm of its gradients after the first record."""
    losses, trained = Losses(), [record for record in records if "tokens_per_s" in record]
    norms = [record["gradient_norm"] for record in trained[1:] if record.get("gradient_norm") is not None]
    return {
        "skipped": sum(record.get("skipped", 0) for record in trained),
        "jumps": sum(losses.jumped(record["loss"]) is not None for record in trained),
        "largest_gradient_norm": max(norms, default=None),
    }


def measured_steps(model: ModelConfig) -> tuple[int, ...]:
    """Returns the step counts of `EVALUATIONS` that a model can take."""
    counts = [n - model.ends for n in EVALUATIONS]
    return tuple(n for n in counts if 0 < n <= model.core and n % model.groups == 0)


def measured(workdir: Path, config: Config, step: int, kinds: Sequence[str] = ()) -> list[Record]:
    """Returns the losses at each number of evaluations that the model can take, also with its matrices quantised as
    `kinds` of `odelm.quantize`, which need no calibration. Raises InputError if the run's text cannot be read."""
    loaded = odelm.load(workdir, step=step)
    model, steps = loaded[0], measured_steps(config.model)
    _, batches = batches_of(loaded, Comparison(length=config.train.length), source=workdir, step=step)
    if not batches:  # it has said why
        raise InputError(
            f"{workdir} has no held-out text to be measured on: restore {config.data.source!r}, and repeat"
        )
    rows = []
    for n, (evaluations, found) in zip(steps, losses_of(model, steps, batches), strict=True):
        rows.append(
            {
                "steps": n,
                "evaluations": evaluations,
                "loss": found.loss,
                "loss_stderr": found.stderr,
                "trained": n in config.trained_counts,
            }
        )
    for kind in kinds:
        quantised = losses_of(odelm.quantize(model, kind), steps, batches)
        for row, (_, found) in zip(rows, quantised, strict=True):
            row.setdefault("quantized", {})[kind] = found.loss
    return rows


def losses_of(model: Any, steps: Sequence[int], batches: Sequence[Batch]) -> list[tuple[int, Any]]:
    """Returns for each step count how many evaluations it takes, and the loss; one program computes all."""
    runner = Runner.of(model)

    @jax.jit
    def sums_of(params: Any, plan: Any, batch: Batch) -> LossSums:
        model = nnx.merge(runner.graph, params)
        return sums_from_hidden(model, model.run(inputs_of(batch), plan)[0], batch)

    found = []
    plans = [runner.plan(n, "euler") for n in steps]
    for plan, alike in zip(plans, in_one_shape(plans), strict=True):
        sums = (jax.device_get(sums_of(runner.params, alike, batch)) for batch in batches)
        found.append((evaluations_of(plan), mean_loss(sums)))
    return found


def scored(workdir: Path, names: list[str], data: Path) -> list[Record]:
    """Returns the rows of the tasks' scores, without those of a group's parts, at the step counts of the report."""
    model, config, tokenizer = odelm.load(workdir)
    scorer = Scorer(
        model, tokenizer, steps=default_steps(config.model), batch_size=256, end_token=config.data.end_token
    )
    tasks = [task for task in find_tasks(names, data) if not scorer.masked or task.kind is SentencePair]
    return [found for found in evaluate(scorer, tasks) if "/" not in found["task"]] if tasks else []

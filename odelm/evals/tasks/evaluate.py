"""Tasks scored by a model at each step count: the rows of `results.json`."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from odelm.errors import InputError
from odelm.evals.likelihood import Likelihood, Scorer
from odelm.evals.predictions import Prediction
from odelm.evals.sweep import latencies_of
from odelm.evals.tasks.items import SentencePair, Task
from odelm.evals.tasks.metrics import Score, mean_of, scores_of

Row = dict[str, Any]
ByStepCount = dict[int, list[Score]]
"""The scores of a task, one for each metric, by the number of steps."""


def evaluate(scorer: Scorer, tasks: Sequence[Task]) -> list[Row]:
    """Returns a row for each task, metric and step count: `task`, `metric`, `steps`, `evaluations`, `value`, `stderr`,
    `n`, `random` and `majority`, the last four of which are None or nan where they have no meaning.

    Tasks of a group are followed by their mean, which has the group's name. How many texts there are, and the time
    taken, are reported on standard error. Raises InputError for tasks that the kind of model cannot do, before anything
    is scored, and for texts that it cannot take.
    """
    check_kinds(scorer, tasks)
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group or task.name, []).append(task)
    start = time.monotonic()
    # The texts of all tasks are scored together, so that they share batches and compiled programs.
    predictions = [of_text for of_group in groups.values() for task in of_group for of_text in _read(scorer, task)]
    for name, of_group in groups.items():
        texts = sum(len(item.pairs) for task in of_group for item in task.items)
        print(f"{name}: {texts:,} texts, each in {', '.join(map(str, scorer.plans))} steps", file=sys.stderr)
    likelihoods = {steps: iter(of_texts) for steps, of_texts in scorer.likelihoods(predictions).items()}
    rows = [row for name, of_group in groups.items() for row in _rows_of(scorer, name, of_group, likelihoods)]
    print(f"scored in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return rows


def check_kinds(scorer: Scorer, tasks: Iterable[Task]) -> None:
    """Raises InputError if an encoder is given a task other than comparing sentences."""
    other = next((task.name for task in tasks if task.kind is not SentencePair), None)
    if scorer.masked and other is not None:
        raise InputError(
            f"{other} is scored by the likelihood of what follows a text, which decoders have; this model is an "
            "encoder: give it BLiMP, or other pairs of sentences"
        )


def time_batches(scorer: Scorer, length: int, *, repeats: int) -> list[Row]:
    """Returns for each step count how long a batch of rows of `length` tokens takes: `steps`, `evaluations` and
    `latency_ms`, with `median` and `p90`."""
    calls = {steps: lambda steps=steps: scorer.forward(steps, length) for steps in scorer.plans}
    latencies = latencies_of(calls, repeats)
    return [
        {
            "steps": steps,
            "evaluations": scorer.evaluations(steps),
            "latency_ms": {"median": latencies[steps].median, "p90": latencies[steps].p90},
        }
        for steps in scorer.plans
    ]


def _read(scorer: Scorer, task: Task) -> list[list[Prediction]]:
    """Returns the rows of each of a task's texts."""
    try:
        return scorer.predictions([pair for item in task.items for pair in item.pairs])
    except InputError as error:
        raise InputError(f"{task.source}: {error}") from error


def _rows_of(
    scorer: Scorer, name: str, tasks: Sequence[Task], likelihoods: Mapping[int, Iterator[Likelihood]]
) -> list[Row]:
    """Returns the rows of a group of tasks, whose texts' likelihoods are the next ones by the step count."""
    found = [
        {
            steps: scores_of(task, _by_item(task, of_texts), vocab_size=scorer.vocab_size)
            for steps, of_texts in likelihoods.items()
        }
        for task in tasks
    ]
    rows = [row for task, scores in zip(tasks, found, strict=True) for row in _rows(scorer, task.name, scores)]
    return rows if tasks[0].group is None else rows + _rows(scorer, name, _mean(found))


def _by_item(task: Task, likelihoods: Iterator[Likelihood]) -> list[list[Likelihood]]:
    return [[next(likelihoods) for _ in item.pairs] for item in task.items]


def _mean(parts: Sequence[ByStepCount]) -> ByStepCount:
    """Returns the mean over tasks of each metric."""
    return {
        steps: [mean_of(scores) for scores in zip(*(part[steps] for part in parts), strict=True)] for steps in parts[0]
    }


def _rows(scorer: Scorer, name: str, by_steps: ByStepCount) -> list[Row]:
    return [
        {
            "task": name,
            "metric": score.metric,
            "steps": steps,
            "evaluations": scorer.evaluations(steps),
            "value": score.value,
            "stderr": score.stderr,
            "n": score.n,
            "random": score.random,
            "majority": score.majority,
        }
        for steps, scores in by_steps.items()
        for score in scores
    ]

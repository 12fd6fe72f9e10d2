"""The metrics of a task, each by its usual definition, and what a constant answer scores. Pure functions of NumPy."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from odelm.config import Task

Metric = Callable[[np.ndarray, np.ndarray], float]
"""Takes predictions and targets, (n,) each: classes, or the numbers of a regression."""


@dataclass(frozen=True)
class TaskScores:
    """The metrics of one evaluation of a task."""

    by_steps: dict[int, dict[str, float]]
    """Each metric by its name, for each number of steps."""
    majority: dict[str, float]
    """The scores of always answering the most frequent class of the training examples."""
    examples: int
    """How many examples were evaluated."""


def scores_of(task: Task, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Returns each metric of a task by its name.

    Args:
        outputs: a model's outputs for n examples, float (n, task.outputs). The largest one is the predicted class.
        targets: classes, int (n,), or the numbers of a regression, float (n,).
    """
    predictions = outputs.argmax(axis=1) if task.labels else outputs[:, 0]
    return {name: METRICS[name](predictions, targets) for name in task.metrics}


def majority_of(task: Task, seen: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Returns each metric for `targets` if every answer is the most frequent class among `seen`, the targets of the
    training examples; for a regression, if every answer is the same number."""
    answer = int(np.bincount(seen).argmax()) if task.labels else 0
    return {name: METRICS[name](np.full(len(targets), answer), targets) for name in task.metrics}


def accuracy(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Returns the share of predictions that are right."""
    return float((predictions == targets).mean())


def f1(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Returns the harmonic mean of precision and recall of class 1; 0 where it neither occurs nor is predicted."""
    right = int(((predictions == 1) & (targets == 1)).sum())
    of_either = int((predictions == 1).sum() + (targets == 1).sum())
    return 2 * right / of_either if of_either else 0.0


def matthews(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Returns the correlation of two classes 0 and 1, from -1 to 1; 0 where the predictions, or the targets, are all of
    one class (Matthews 1975, doi:10.1016/0005-2795(75)90109-9)."""
    return pearson(predictions, targets)


def pearson(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Returns the linear correlation, from -1 to 1; 0 where predictions or targets are constant, for which it is
    undefined, and nan where one of them is not finite."""
    x, y = (values.astype(np.float64) for values in (predictions, targets))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def spearman(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Returns the correlation of ranks, equal values sharing their mean rank; 0 and nan as for `pearson`."""
    from scipy.stats import rankdata  # takes a second to import

    if not (np.isfinite(predictions).all() and np.isfinite(targets).all()):
        return float("nan")
    return pearson(rankdata(predictions), rankdata(targets))


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}

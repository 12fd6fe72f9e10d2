"""The metrics of GLUE against SciPy and against their definitions, and where they are undefined."""

import numpy as np
import pytest
from scipy import stats

from odelm.config import TASKS
from odelm.data.scores import METRICS, accuracy, f1, majority_of, matthews, pearson, scores_of, spearman


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_scipy(seed):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 6, 200) / 2  # many equal ones, as scores of STS-B are
    predictions = (targets + rng.normal(0, 2, 200)).round(1)
    assert pearson(predictions, targets) == pytest.approx(stats.pearsonr(predictions, targets)[0], abs=1e-12)
    assert spearman(predictions, targets) == pytest.approx(stats.spearmanr(predictions, targets)[0], abs=1e-12)
    assert pearson(predictions, targets) != pytest.approx(spearman(predictions, targets), abs=1e-3)


def test_metrics_of_classes_are_those_of_the_confusion_matrix():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    predictions = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    targets = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    assert accuracy(predictions, targets) == 0.7
    assert f1(predictions, targets) == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    expected = (3 * 4 - 1 * 2) / np.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert matthews(predictions, targets) == pytest.approx(expected)
    assert matthews(1 - predictions, targets) == pytest.approx(-expected)


def test_what_is_undefined_is_0_and_what_is_not_finite_is_nan():
    constant, targets = np.ones(4), np.array([0, 1, 1, 0])
    assert matthews(constant, targets) == pearson(constant, targets) == spearman(constant, targets) == 0
    assert f1(np.zeros(4), np.zeros(4)) == 0 and matthews(targets, np.ones(4)) == 0
    broken = np.array([1.0, np.nan, 2.0, 3.0])
    assert np.isnan(pearson(broken, targets)) and np.isnan(spearman(broken, targets))
    assert np.isnan(spearman(np.array([1.0, np.inf, 2.0, 3.0]), targets)), "a rank would hide it"


def test_a_task_has_its_official_metrics():
    official = {
        "cola": ("matthews",), "mrpc": ("accuracy", "f1"), "qnli": ("accuracy",), "rte": ("accuracy",),
        "sst2": ("accuracy",), "stsb": ("pearson", "spearman"), "wnli": ("accuracy",),
    }  # fmt: skip
    assert {name: task.metrics for name, task in TASKS.items()} == official
    assert all(set(task.metrics) <= METRICS.keys() for task in TASKS.values())


def test_a_class_is_the_largest_output_and_a_regression_the_only_one():
    logits, targets = np.array([[2.0, 1.0], [0.0, 3.0], [5.0, -5.0], [1.0, 2.0]]), np.array([0, 1, 1, 1])
    assert scores_of(TASKS["mrpc"], logits, targets) == {"accuracy": 0.75, "f1": 0.8}
    numbers = np.array([[1.0], [2.0], [4.0]])
    assert scores_of(TASKS["stsb"], numbers, np.array([0.0, 1.0, 3.0])) == pytest.approx({"pearson": 1, "spearman": 1})


def test_the_majority_is_that_of_the_training_examples():
    seen, targets = np.array([1, 1, 0]), np.array([1, 0, 0, 0])
    assert majority_of(TASKS["mrpc"], seen, targets) == {"accuracy": 0.25, "f1": pytest.approx(0.4)}
    assert majority_of(TASKS["cola"], seen, targets) == {"matthews": 0}
    zero = {"pearson": 0, "spearman": 0}
    assert majority_of(TASKS["stsb"], np.array([1.0, 2.5]), np.array([0.0, 5.0])) == zero

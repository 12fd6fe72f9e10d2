"""The tasks of GLUE that a classifier is fine-tuned on: where texts and labels are, and what is measured.

Wang et al. 2018, "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding"
(arXiv 1804.07461); the metrics are those of its table 1.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task: its columns in the official TSV files, its labels and its metrics."""

    texts: tuple[str, ...]
    """The columns of one sentence, or of a pair."""
    label: str
    """The column of the label."""
    labels: tuple[str, ...]
    """The labels in the order of the classes; empty for a regression."""
    metrics: tuple[str, ...]
    """Names in `odelm.data.scores.METRICS`, the main one first."""
    header: tuple[str, ...] = ()
    """The columns of files that have no header line."""

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for an example: one for each class, or 1 for a regression."""
        return len(self.labels) or 1


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")

TASKS: dict[str, Task] = {
    "cola": Task(("sentence",), "label", BINARY, ("matthews",), header=("source", "label", "mark", "sentence")),
    "mrpc": Task(("#1 String", "#2 String"), "Quality", BINARY, ("accuracy", "f1")),
    "qnli": Task(("question", "sentence"), "label", ENTAILMENT, ("accuracy",)),
    "rte": Task(PAIR, "label", ENTAILMENT, ("accuracy",)),
    "sst2": Task(("sentence",), "label", BINARY, ("accuracy",)),
    "stsb": Task(PAIR, "score", (), ("pearson", "spearman")),
    "wnli": Task(PAIR, "label", BINARY, ("accuracy",)),
}
LOWEST, HIGHEST = 0.0, 5.0
"""The range of the scores of a regression (STS-B)."""

"""The official files of GLUE: tab-separated, without quotes, a header line except in CoLA, a label in train and dev."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from odelm import rng
from odelm.config import TASKS, DataConfig, Task
from odelm.config.tasks import HIGHEST, LOWEST
from odelm.errors import InputError, nearest

TRAIN, DEV = "train.tsv", "dev.tsv"


@dataclass(frozen=True)
class Labelled:
    """The examples of a split, as text."""

    texts: tuple[list[str], ...]
    """The sentences (n,), or the first and the second ones of pairs."""
    targets: np.ndarray
    """Classes, int32 (n,), or the numbers of a regression, float32 (n,)."""

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, places: np.ndarray) -> "Labelled":
        """Returns the examples at `places`, int (m,)."""
        texts = tuple([column[place] for place in places] for column in self.texts)
        return Labelled(texts, self.targets[places])


def read_task(config: DataConfig) -> tuple[Labelled, Labelled]:
    """Returns the training and the evaluated examples of `config.task`: train.tsv and dev.tsv, or with
    `config.train_share` two parts of dev.tsv, the same for every seed.

    Raises InputError, naming the file and the line, for a file that is missing or empty, a column that is missing, a
    line with another number of columns, and a label that the task does not have.
    """
    task, folder = TASKS[config.task], task_folder(config)
    dev = read_examples(folder / DEV, task)
    if not config.train_share:
        if not (folder / TRAIN).is_file():
            raise InputError(
                f"{folder} has no {TRAIN}; to train on a part of {DEV} and evaluate on the rest, give "
                "--config.data.train_share=0.8"
            )
        return read_examples(folder / TRAIN, task), dev
    if (folder / TRAIN).is_file():
        raise InputError(
            f"data.train_share is {config.train_share}, which trains on a part of {DEV}, but {folder} has a {TRAIN}: "
            "leave the option out"
        )
    order, count = rng.host(0, "train_share").permutation(len(dev)), round(config.train_share * len(dev))
    if not 0 < count < len(dev):
        raise InputError(f"data.train_share is {config.train_share} of {len(dev)} examples, which leaves a part empty")
    return dev.take(np.sort(order[:count])), dev.take(np.sort(order[count:]))


def task_folder(config: DataConfig) -> Path:
    """Returns the folder of a task's files: `config.source`, or the task's folder inside it (`SST-2` for sst2)."""
    source = Path(config.source).expanduser()
    if not source.is_dir():
        raise InputError(f"data.source is {config.source}, which is not a folder; give that of {config.task}'s files")
    if (source / DEV).is_file() or (source / TRAIN).is_file():
        return source
    named = {_plain(path.name): path for path in sorted(source.iterdir()) if path.is_dir()}
    if config.task not in named:
        hint = nearest(config.task, named) if named else "it has no folders"
        raise InputError(f"data.source is {source}, which has neither a {DEV} nor a folder for {config.task}; {hint}")
    return named[config.task]


def read_examples(path: Path, task: Task) -> Labelled:
    """Returns the examples of a TSV file; InputError as `read_task`."""
    rows = _rows(path)
    place, header = (path.name, list(task.header)) if task.header else next(rows, (path.name, []))
    missing = [name for name in (*task.texts, task.label) if name not in header]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r} in its first line, expected one of this task's files")
    columns = [header.index(name) for name in (*task.texts, task.label)]
    found, targets = [], []
    for place, row in rows:
        if len(row) != len(header):
            raise InputError(f"{path}, {place} has {len(row)} columns, expected {len(header)}, parted by tabs")
        *texts, label = (row[column] for column in columns)
        found.append(texts)
        targets.append(_target(label, task, f"{path}, {place}"))
    if not found:
        raise InputError(f"{path} has no examples: it is empty")
    dtype = np.int32 if task.labels else np.float32
    return Labelled(tuple(map(list, zip(*found, strict=True))), np.array(targets, dtype))


def _rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the columns of each line that is not blank; a quotation mark is a character like any other."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); data.source is the folder of its files") from error
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line} is not UTF-8 ({error.reason}): convert it (iconv -t UTF-8)") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"line {number}", line.removesuffix("\r").split("\t")


def _target(label: str, task: Task, place: str) -> float:
    if task.labels:
        if label not in task.labels:
            raise InputError(f"{place} has the label {label!r}; {nearest(label, task.labels)}")
        return task.labels.index(label)
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not LOWEST <= score <= HIGHEST:
        raise InputError(f"{place} has the score {label!r}, expected a number from {LOWEST:g} to {HIGHEST:g}")
    return score


def _plain(name: str) -> str:
    """Returns a folder's name in the form of a task's name: `stsb` for `STS-B`."""
    return "".join(character for character in name.lower() if character.isalnum())


def all_texts(examples: Labelled) -> Sequence[str]:
    """Returns every sentence of some examples."""
    return [text for column in examples.texts for text in column]

"""Batches of windows in an order that is a pure function of (seed, index): a position can be read and set."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import numpy as np
from absl.flags import FLAGS

from odelm import rng
from odelm.config import Config
from odelm.data.examples import TaskData
from odelm.data.masking import MaskedRows, masked_rows
from odelm.data.tokens import Prepared, Split, Stream
from odelm.data.windows import DocumentWindows, JoinedWindows, Spans, StreamWindows, Windows, joined
from odelm.errors import InputError
from odelm.interrupts import deaf_children
from odelm.tokenizer import end_id

Batch = dict[str, np.ndarray]

READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

NO_TOKENS = Stream(np.empty(0, np.uint16), np.empty(0, np.int64))

EPOCHS = 2**32
"""Effectively endless, and the number of epochs that get their own shuffle; Grain's endless `repeat` overflows in
`batch(1)`."""


@dataclass(frozen=True)
class NextTokenRows:
    """Turns windows of L + 1 tokens into rows of L and the token after each. Windows overlap by one token, so each
    token but the first of the stream is predicted once an epoch."""

    length: int
    end: int
    segments: bool = False

    @property
    def size(self) -> int:
        return self.length + 1

    @property
    def stride(self) -> int:
        return self.length

    def batch(self, windows: Batch) -> Batch:
        """Returns `tokens`, `targets` int32 (B, L) and `weights` float32 (B, L), 0 where a short window is padded.

        With segments also `segments` int32 (B, L). An end token is the last target of its document and the first token
        of the next segment, whose first word it predicts, so that every token is predicted from its own document only.
        """
        places, counts = np.arange(self.size), windows["count"][:, None]
        padded = np.where(places < counts, windows["window"], self.end).astype(np.int32)
        weights = (places[1:] < counts).astype(np.float32)
        rows = {"tokens": padded[:, :-1], "targets": padded[:, 1:], "weights": weights}
        if self.segments:
            rows["segments"] = np.cumsum(rows["tokens"] == self.end, axis=1, dtype=np.int32)
        return rows


class TrainBatches(grain.IterDataset):
    """The endless training batches of one process, from update `start` on, as a Grain dataset.

    An iterator's state is the number of updates whose batches it has yielded. The state does not depend on the number
    of workers and processes, so a run may be resumed with other numbers.
    """

    def __init__(self, batches: grain.MapDataset, *, start: int, process_index: int, process_count: int, workers: int):
        super().__init__()
        self.start, self._workers = start, workers
        self._batches, self._process, self._processes = batches, process_index, process_count

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def __str__(self) -> str:
        return f"TrainBatches(start={self.start}, process {self._process} of {self._processes})"

    def source(self, update: int) -> Iterator[Batch]:
        """Returns Grain's iterator over the batches from `update` on."""
        mine = self._batches[update * self._processes + self._process :: self._processes].to_iter_dataset(READ_OPTIONS)
        if self._workers:
            if not FLAGS.is_parsed():
                # Grain reads its own absl flags, which are not parsed in a notebook or a test.
                FLAGS.mark_as_parsed()
            mine = mine.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(mine)


class BatchIterator(grain.DatasetIterator):
    """Iterates over `TrainBatches`."""

    def __init__(self, dataset: TrainBatches):
        super().__init__()
        self._dataset, self._update = dataset, dataset.start
        self._source: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._source is None:
            with deaf_children():
                self._source = self._dataset.source(self._update)
                batch = next(self._source)
        else:
            batch = next(self._source)
        self._update += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"update": self._update}

    def set_state(self, state: dict[str, Any]) -> None:
        self._update, self._source = int(state["update"]), None


def train_batches(
    prepared: Prepared | TaskData, config: Config, *, start: int = 0, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
    """Returns the endless training batches from update `start` on, this process's rows of each.

    Every epoch is a new permutation of all windows, a batch may span two epochs, and the iterator from
    `start` yields what one from 0 yields after `start` batches. Process p holds rows p B / n to (p + 1) B / n
    of a global batch of B = train.batch_size. With `data.weights` each component is shuffled and repeated on its own,
    and their windows are mixed in these proportions. `get_state()` returns the position, `set_state(state)` changes it.

    Decoder: `tokens`, `targets` int32 (B, L), `weights` float32 (B, L), with L = train.length. Encoder: see
    `odelm.data.masking.MaskedRows.batch`; masks are new every epoch. With `data.packing` "segments" also `segments`
    int32 (B, L), the document of each token. For a task, see `odelm.data.examples.Examples.batch`.

    Raises InputError if B does not divide over the processes, or the split holds less than one window.
    """
    return iter(train_dataset(prepared, config, start=start, process_index=process_index, process_count=process_count))


def train_dataset(
    prepared: Prepared | TaskData, config: Config, *, start: int = 0, process_index: int = 0, process_count: int = 1
) -> TrainBatches:
    """Returns the Grain dataset that `train_batches` iterates over."""
    size, rest = divmod(config.train.batch_size, process_count)
    if rest:
        raise InputError(
            f"train.batch_size is {config.train.batch_size}, expected a multiple of the {process_count} processes"
        )
    if isinstance(prepared, TaskData):
        batches = _example_batches(prepared, config, size)
    else:
        batches = _text_batches(prepared, config, size)
    return TrainBatches(
        batches,
        start=start,
        process_index=process_index,
        process_count=process_count,
        workers=config.data.workers,
    )


def _text_batches(prepared: Prepared, config: Config, size: int) -> grain.MapDataset:
    rows = _rows(prepared, config, length=config.train.length, stream="mask")
    _check_enough(prepared.train, rows.size if config.packing != "documents" else 2, "training")
    windows, order = _order(prepared.train, rows, config)
    # Whole batches are made at once: Python work for each row would keep the accelerator waiting.
    return order.batch(size).map_with_index(partial(_batch, windows=windows, rows=rows))


def _example_batches(prepared: TaskData, config: Config, size: int) -> grain.MapDataset:
    order = _epochs(range(len(prepared.train)), "the task", config.train.seed)
    return order.batch(size).map(prepared.train.batch)


@dataclass(frozen=True)
class HeldOutRows:
    """Rows of the held-out split, each of its tokens in one: all rows, or a random sample that is always the same.

    The first documents of a split would be a poor sample: they come from few sources, and their loss reflects those
    only.
    """

    windows: Spans
    order: np.ndarray
    """Which windows, in the order in which they are read, int64 (rows,)."""
    rows: NextTokenRows | MaskedRows
    ends: np.ndarray
    """Where each document of the split ends, int64 (documents,)."""

    def __len__(self) -> int:
        return len(self.order)

    @property
    def documents(self) -> int:
        """How many documents have tokens in the rows."""
        starts, stops = self.windows.spans(self.order)
        first, last = (np.searchsorted(self.ends, places, side="right") for places in (starts, stops - 1))
        seen = np.zeros(len(self.ends) + 1, np.int64)
        np.add.at(seen, first, 1)
        np.add.at(seen, np.minimum(last + 1, len(self.ends)), -1)
        return int((np.cumsum(seen)[:-1] > 0).sum())

    def batches(self, size: int) -> Iterator[Batch]:
        """Yields the rows in batches of one shape: a short window is padded with tokens and the last batch with rows,
        at weight 0. The keys are those of `train_batches`; masks are a fixed function of (seed, row)."""
        for number, start in enumerate(range(0, len(self), size)):
            indices = self.order[start : start + size]
            yield _batch(number, indices, windows=self.windows, rows=self.rows, size=size)


def held_out_rows(prepared: Prepared, config: Config, *, length: int | None = None, limit: int = 0) -> HeldOutRows:
    """Returns `limit` rows of the held-out split at most (0: all), of `length` tokens (by default as in training).

    Raises InputError if the split holds no token to predict.
    """
    rows = _rows(prepared, config, length=length or config.train.length, stream="eval_mask")
    _check_enough(prepared.validation, 2, "validation")
    stream = joined(prepared.validation)
    windows = _windows(stream, rows, config, whole=False)
    order = rng.host(0, "eval_order").permutation(len(windows))
    return HeldOutRows(windows, order[: limit or None], rows, np.cumsum(stream.lengths))


def eval_batches(
    prepared: Prepared, config: Config, *, length: int | None = None, batch_size: int | None = None, limit: int = 0
) -> Iterator[Batch]:
    """Returns `limit` batches of `held_out_rows` at most (0: all); `length` and `batch_size` default to training's."""
    size = batch_size or config.train.batch_size
    return held_out_rows(prepared, config, length=length, limit=limit * size).batches(size)


def _batch(
    number: int, indices: np.ndarray, *, windows: Windows, rows: NextTokenRows | MaskedRows, size: int = 0
) -> Batch:
    """Returns the rows of batch `number`: those of the windows `indices` (B,), then empty ones up to `size` rows."""
    size = size or len(indices)
    read = windows.batch(np.asarray(indices))
    missing = size - len(indices)
    filled = {name: np.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1))) for name, array in read.items()}
    return rows.batch(filled | {"index": number * size + np.arange(size)})


def _rows(prepared: Prepared, config: Config, *, length: int, stream: str) -> NextTokenRows | MaskedRows:
    if config.model.kind == "decoder":
        return NextTokenRows(
            length, end_id(prepared.tokenizer, config.data.end_token), segments=config.packing == "segments"
        )
    return masked_rows(prepared.tokenizer, config, length=length, stream=stream)


def _windows(stream: Stream, rows: NextTokenRows | MaskedRows, config: Config, *, whole: bool) -> Spans:
    if config.packing == "documents":
        # A masked row already ends with [SEP]; a decoder predicts a document's first token from the end token before.
        reach = {"before": 1} if isinstance(rows, NextTokenRows) else {"after": -1}
        return DocumentWindows(stream, size=rows.size, stride=rows.stride, **reach)
    return StreamWindows(stream, size=rows.size, stride=rows.stride, whole=whole and len(stream.tokens) >= rows.size)


def _order(split: Split, rows: NextTokenRows | MaskedRows, config: Config) -> tuple[Windows, grain.MapDataset]:
    """Returns the windows, and the order in which training reads them, epoch after epoch."""
    weights = dict(zip(config.data.components, config.data.weights, strict=False))
    # The last row may be short for a decoder, whose tokens do not see the padding after them.
    make = partial(_windows, rows=rows, config=config, whole=config.model.kind == "encoder")
    if not weights:
        windows = make(joined(split))
        return windows, _epochs(range(len(windows)), "the corpus", config.train.seed)
    seeds = rng.host(config.train.seed, "components").integers(2**31, size=len(weights))
    parts = [make(split.get(name, NO_TOKENS)) for name in weights]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    orders = [
        _epochs(range(end - len(part), end), name, int(seed))
        for part, end, name, seed in zip(parts, ends, weights, seeds, strict=True)
    ]
    # Grain truncates shares to whole hundredths of the smallest one: 1.15 as a float would become 114.
    smallest = min(weights.values())
    shares = [round(10_000 * weight / smallest) for weight in weights.values()]
    return JoinedWindows(parts), grain.MapDataset.mix(orders, shares)


def _epochs(windows: range, name: str, seed: int) -> grain.MapDataset:
    if not windows:
        raise InputError(f"{name} is too short for a single window of training text: give more, or leave it out")
    return grain.MapDataset.range(windows.start, windows.stop).seed(seed).shuffle().repeat(EPOCHS)


def _check_enough(split: Split, needed: int, name: str) -> None:
    tokens = sum(len(stream.tokens) for stream in split.values())
    if tokens < needed:
        raise InputError(
            f"the {name} split has {tokens} tokens, fewer than the {needed} of one window; "
            "give more text, change data.valid_fraction or shorten train.length"
        )

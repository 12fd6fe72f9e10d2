"""Batches of windows in an order that is a pure function of (seed, index): a position can be read and set."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np

from odelm.config import Config
from odelm.data.masking import MaskedRows, masked_rows
from odelm.data.prepare import Prepared
from odelm.data.tokenizer import special_id
from odelm.errors import InputError

Batch = dict[str, np.ndarray]

READING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

EPOCHS = 2**32
"""As good as endless, and as many as have their own shuffle; Grain's endless `repeat` overflows in `batch(1)`."""


class Windows:
    """Random access to windows of `size` tokens, `stride` apart, that cover all of `tokens` (n,).

    The last window is cut short, or with `whole` begins early enough to be of full size.
    """

    def __init__(self, tokens: np.ndarray, *, size: int, stride: int, whole: bool = False):
        self._tokens, self._size, self._stride = tokens, size, stride
        self._last_start = len(tokens) - size if whole else len(tokens)

    def __len__(self) -> int:
        return -(-(len(self._tokens) - (self._size - self._stride)) // self._stride)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns window `index`, int32 (size,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = min(index * self._stride, self._last_start)
        return self._tokens[start : start + self._size].astype(np.int32)


@dataclass(frozen=True)
class NextTokenRows:
    """Turns windows of L + 1 tokens into rows of L and the token after each. Windows overlap by that one
    token, so each token but the first of the stream is predicted once an epoch."""

    length: int
    pad: int

    @property
    def size(self) -> int:
        return self.length + 1

    @property
    def stride(self) -> int:
        return self.length

    def batch(self, windows: Batch) -> Batch:
        """Returns `tokens`, `targets` int32 (B, L) and `weights` float32 (B, L), 0 where a short window is padded."""
        places, counts = np.arange(self.size), windows["count"][:, None]
        padded = np.where(places < counts, windows["window"], self.pad).astype(np.int32)
        weights = (places[1:] < counts).astype(np.float32)
        return {"tokens": padded[:, :-1], "targets": padded[:, 1:], "weights": weights}


def train_batches(
    prepared: Prepared, config: Config, *, start: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Returns the endless training batches from update `start` on, this process's rows of each.

    Every epoch is a new permutation of all windows, a batch may span two of them, and the iterator from
    `start` yields what one from 0 yields after `start` batches. Process p holds rows p B / n to (p + 1) B / n
    of a global batch of B = train.batch_size.

    Decoder: `tokens`, `targets` int32 (B, L), `weights` float32 (B, L), with L = train.length. Encoder: see
    `odelm.data.masking.MaskedRows.batch`; masks are new every epoch.

    Raises InputError if B does not divide over the processes, or the split holds less than one window.
    """
    size, rest = divmod(config.train.batch_size, process_count)
    if rest:
        raise InputError(
            f"train.batch_size is {config.train.batch_size}, expected a multiple of the {process_count} processes"
        )
    rows = _rows(prepared, config, length=config.train.length, stream="mask")
    _check_enough(prepared.train, rows.size, "training")
    # A short last row costs a decoder nothing, since no token sees those after it.
    whole = config.model.kind == "encoder"
    windows = Windows(prepared.train, size=rows.size, stride=rows.stride, whole=whole)
    dataset = grain.MapDataset.source(windows).seed(config.train.seed).shuffle().repeat(EPOCHS)
    # Whole batches are made at once: a call of NumPy for every row would hold the accelerator up.
    batches = dataset.map_with_index(partial(_padded, size=rows.size)).batch(size).map(rows.batch)
    return iter(batches[start * process_count + process_index :: process_count].to_iter_dataset(READING))


def eval_batches(
    prepared: Prepared, config: Config, *, length: int | None = None, batch_size: int | None = None, limit: int = 0
) -> Iterator[Batch]:
    """Returns the batches of the held-out split in order, each token once, `limit` of them at most (0: all).

    `length` and `batch_size` default to those of training. The keys are those of `train_batches`; all batches
    have one shape: a short last window is padded, and so is the last batch with rows, at weight 0. Masks are
    a fixed function of (seed, row). Raises InputError if the split holds no token to predict.
    """
    rows = _rows(prepared, config, length=length or config.train.length, stream="eval_mask")
    _check_enough(prepared.validation, 2, "validation")
    size = batch_size or config.train.batch_size
    windows = Windows(prepared.validation, size=rows.size, stride=rows.stride)
    count = -(-len(windows) // size)
    padding = [np.empty(0, np.int32)] * (count * size - len(windows))
    each = itertools.chain(map(windows.__getitem__, range(len(windows))), padding)
    padded = (_padded(index, window, size=rows.size) for index, window in enumerate(each))
    return (rows.batch(_stack(list(itertools.islice(padded, size)))) for _ in range(min(count, limit or count)))


def _rows(prepared: Prepared, config: Config, *, length: int, stream: str) -> NextTokenRows | MaskedRows:
    if config.model.kind == "decoder":
        return NextTokenRows(length, pad=special_id(prepared.tokenizer, "end"))
    return masked_rows(prepared.tokenizer, config, length=length, stream=stream)


def _padded(index: int, window: np.ndarray, *, size: int) -> Batch:
    """Returns a window filled up to `size` tokens, how many of them count, and its index."""
    return {
        "index": np.array(index, np.int64),
        "window": np.pad(window, (0, size - len(window))),
        "count": np.array(len(window), np.int64),
    }


def _check_enough(tokens: np.ndarray, needed: int, split: str) -> None:
    if len(tokens) < needed:
        raise InputError(
            f"the {split} split has {len(tokens)} tokens, fewer than the {needed} of one window; "
            "give more text, change data.valid_fraction or shorten train.length"
        )


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

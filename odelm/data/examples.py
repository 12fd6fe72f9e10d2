"""Labelled examples as rows of tokens: `[CLS] a [SEP]`, or `[CLS] a [SEP] b [SEP]`, as BERT reads them.

Devlin et al. 2018 (arXiv 1810.04805, section 3). Rows are made once and kept in memory.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from odelm import rng
from odelm import tokenizer as tokenizers
from odelm.config import TASKS, Config, Task
from odelm.data.glue import all_texts, read_task
from odelm.data.scores import majority_of, scores_of
from odelm.data.tokens import TOKENIZER
from odelm.errors import InputError
from odelm.files import data_folder, fingerprint, publish

Batch = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Rows:
    """n texts, or pairs of texts, as rows of L tokens."""

    tokens: np.ndarray
    """int32 (n, L), with padding at the end."""
    lengths: np.ndarray
    """int32 (n,), the tokens before the padding."""
    second: np.ndarray
    """int32 (n,), the place of the second text's first token; for a single text, its length."""
    cut: int
    """How many examples were longer than L, and lost their end."""

    def __len__(self) -> int:
        return len(self.tokens)

    def inputs(self, *, token_types: bool) -> Batch:
        """Returns a model's inputs: `tokens`, `mask` bool (n, L), True at real tokens, and `token_types` int32
        (n, L), 1 in the second text, if the model has them."""
        places = np.arange(self.tokens.shape[1])
        found = {"tokens": self.tokens, "mask": places < self.lengths[:, None]}
        if token_types:
            found["token_types"] = ((places >= self.second[:, None]) & found["mask"]).astype(np.int32)
        return found


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of one split of a task."""

    rows: Rows
    targets: np.ndarray
    """Classes, int32 (n,), or the numbers of a regression, float32 (n,)."""
    token_types: bool

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: np.ndarray, size: int = 0) -> Batch:
        """Returns the examples of `indices` (B,), and rows of padding up to `size`.

        `tokens` int32 (B, L), `mask` bool (B, L), `token_types` int32 (B, L) if the model has them, `targets` int32 or
        float32 (B, 1), `weights` float32 (B, 1), 0 for a row of padding.
        """
        indices = np.asarray(indices)
        # A row of padding repeats the first example, at weight 0.
        taken = np.concatenate([indices, np.full(max(size - len(indices), 0), indices[0])])
        rows = Rows(self.rows.tokens[taken], self.rows.lengths[taken], self.rows.second[taken], 0)
        weights = (np.arange(len(taken)) < len(indices)).astype(np.float32)
        targets = self.targets[taken]
        return rows.inputs(token_types=self.token_types) | {"targets": targets[:, None], "weights": weights[:, None]}


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task as rows of tokens, used in place of a corpus (`odelm.data.tokens.Prepared`)."""

    task: Task
    tokenizer: Tokenizer
    train: Examples
    validation: Examples
    digest: str
    """SHA-256, in hex, of the tokens and the targets of both splits."""
    summary: str
    """How many examples there are, and how many were cut."""

    def held_out(self, limit: int = 0) -> "HeldOutExamples":
        """Returns `limit` of the evaluated examples at most (0: all), always the same ones."""
        order = rng.host(0, "eval_order").permutation(len(self.validation))
        return HeldOutExamples(self, order[: limit or None])


@dataclass(frozen=True, eq=False)
class HeldOutExamples:
    """Evaluated examples in the order in which they are read, int64 (n,)."""

    data: TaskData
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    @property
    def documents(self) -> int:
        """How many examples there are."""
        return len(self)

    def scores(self, outputs: np.ndarray) -> dict[str, float]:
        """Returns each metric of the task, given a model's outputs for the rows of all batches, float (rows, outputs);
        padding rows at the end are left out."""
        return scores_of(self.data.task, outputs[: len(self)], self._targets)

    def majority(self) -> dict[str, float]:
        """Returns the scores of always answering the most frequent class of the training examples."""
        return majority_of(self.data.task, self.data.train.targets, self._targets)

    @property
    def _targets(self) -> np.ndarray:
        return self.data.validation.targets[self.order]

    def batches(self, size: int) -> Iterator[Batch]:
        """Yields batches of one shape: the last one is padded with rows of weight 0."""
        for start in range(0, len(self), size):
            yield self.data.validation.batch(self.order[start : start + size], size)


def read_task_data(config: Config, *, tokenizer_file: str | Path | None = None) -> TaskData:
    """Returns the examples of `config.data.task`, tokenised.

    The tokenizer is that of `tokenizer_file`, else `config.data.tokenizer`, else a byte-level BPE trained on the
    sentences of train.tsv. Raises InputError as `odelm.data.glue.read_task`, for a tokenizer that is invalid, lacks a
    special token or has more tokens than the model, and for a `train.length` with no room for text.
    """
    labelled = read_task(config.data)
    tokenizer = _tokenizer(config, all_texts(labelled[0]), tokenizer_file)
    typed = config.model.token_types > 1
    train, validation = (
        Examples(rows_of(split.texts, tokenizer, length=config.train.length), split.targets, typed)
        for split in labelled
    )
    digest = hashlib.sha256()
    for split in (train, validation):
        for array in (split.rows.tokens, split.rows.second, split.targets):
            digest.update(np.ascontiguousarray(array).tobytes())
    cut = train.rows.cut + validation.rows.cut
    summary = (
        f"{config.data.task}: {len(train):,} training examples, {len(train) / config.train.batch_size:,.1f} updates an "
        f"epoch, and {len(validation):,} that are evaluated; {cut:,} longer than {config.train.length} tokens, cut"
    )
    return TaskData(TASKS[config.data.task], tokenizer, train, validation, digest.hexdigest(), summary)


def rows_of(texts: Sequence[Sequence[str]], tokenizer: Tokenizer, *, length: int) -> Rows:
    """Returns texts (a sequence of n sentences, or two such sequences for pairs) as rows of `length` tokens.

    A row that is too long is cut: in a pair, the longer text loses its last token until both fit. Raises InputError for
    a tokenizer without a class, separator or padding token, and for a length without room for text.
    """
    cls, sep, pad = (tokenizers.special_id(tokenizer, role) for role in ("cls", "sep", "pad"))
    room = length - 1 - len(texts)
    if room < len(texts):
        raise InputError(
            f"a row of {length} tokens has no room for {len(texts)} texts, expected {1 + 2 * len(texts)} or more: "
            "train.length"
        )
    columns = [tokenizers.encode_each(tokenizer, column) for column in texts]
    counts = np.array([[len(ids) for ids in column] for column in columns], np.int64)
    kept = counts_within(counts, room)
    tokens = np.full((counts.shape[1], length), pad, np.int32)
    for row, sizes, *parts in zip(tokens, kept.T.tolist(), *columns, strict=True):
        ids = [cls]
        for size, part in zip(sizes, parts, strict=True):
            ids += [*part[:size], sep]
        row[: len(ids)] = ids
    lengths = kept.sum(axis=0) + 1 + len(texts)
    return Rows(
        tokens, lengths.astype(np.int32), (kept[0] + 2).astype(np.int32), int((counts != kept).any(axis=0).sum())
    )


def counts_within(counts: np.ndarray, room: int) -> np.ndarray:
    """Returns how many tokens of each text are kept so that both fit into `room`, int (1 or 2, n) of (1 or 2, n)."""
    if len(counts) == 1:
        return np.minimum(counts, room)
    first = np.minimum(counts[0], np.maximum(-(-room // 2), room - counts[1]))
    return np.stack([first, np.minimum(counts[1], room - first)])


def _tokenizer(config: Config, texts: Sequence[str], file: str | Path | None) -> Tokenizer:
    path = file or config.data.tokenizer
    if not path:
        path = _trained_tokenizer(config, texts)
    return tokenizers.check_size(tokenizers.load(path), config.model.vocab_size)


def _trained_tokenizer(config: Config, texts: Sequence[str]) -> Path:
    """Returns the path of the tokenizer trained on some texts, training it if it is not there."""
    vocab_size = config.data.vocab_size or config.model.vocab_size
    tokenizers.check_trainable(vocab_size)
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    key = fingerprint("task", digest, vocab_size, config.data.tokenizer_bytes)
    directory = data_folder(config.data.data_dir) / "tokenizers" / key
    if not directory.is_dir():
        trained = tokenizers.train(texts, vocab_size=vocab_size, max_bytes=config.data.tokenizer_bytes)
        with publish(directory) as partial:
            trained.save(str(partial / TOKENIZER))
    return directory / TOKENIZER

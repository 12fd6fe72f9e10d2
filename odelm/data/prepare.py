"""From a corpus to token files: prepared once, found again by a fingerprint of all that they depend on."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from odelm.config import Config, fingerprint
from odelm.data import tokenizer as tokenizers
from odelm.data.cache import publish
from odelm.data.corpora import SPLITS, Corpus, find_corpus
from odelm.data.documents import text_documents
from odelm.data.files import text_files
from odelm.errors import InputError

FORMAT = 2
"""Part of every fingerprint: raise it when what is written changes."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A corpus as tokens. Documents stand in a fixed order, each followed by the end-of-text token."""

    tokenizer: Tokenizer
    train: np.ndarray
    """Token ids, uint16 or uint32 (n,), mapped from the file."""
    validation: np.ndarray
    bytes_per_token: float
    """UTF-8 bytes of the validation documents over its tokens, end-of-text tokens counted."""
    directory: Path
    digest: str
    """SHA-256, in hex, of the tokens of both splits."""


def prepare(config: Config, *, tokenizer_file: str | Path | None = None) -> Prepared:
    """Returns the tokens of `config.data`, made on the first call and found again on the next.

    `tokenizer_file`, a tokenizer.json such as the one beside a checkpoint, stands in for the configured or
    trained tokenizer; the tokens are the same if it is a copy. A later call reads no source file, only their
    sizes and times. Any number of processes may call at once.

    Raises InputError for a source or tokenizer that cannot be used, and for a tokenizer with more tokens than
    `config.model.vocab_size`.
    """
    corpus = find_corpus(config.data)
    path = tokenizer_file or config.data.tokenizer or _trained(config, corpus)
    tokenizer = tokenizers.check_size(tokenizers.load(path), config.model.vocab_size)
    key = fingerprint(FORMAT, corpus.config.name, tokenizer.to_str())
    directory = Path(config.data.data_dir).expanduser() / "tokens" / f"{config.data.corpus}-{key}"
    if not directory.is_dir():
        with publish(directory) as partial:
            _write(corpus, tokenizer, partial)
        prepared = _open(directory, tokenizer)
        print(_summary(config, prepared), file=sys.stderr)
        return prepared
    return _open(directory, tokenizer)


def read_text(source: str, tokenizer: Tokenizer) -> Prepared:
    """Returns the documents of files of text as the validation split, tokenised in memory; the other split is empty.

    `source` is as `config.data.source`. Raises InputError if there is no text.
    """
    counter = _Counter(document for file in text_files(source, option="the text") for document in text_documents(file))
    tokens = np.array([number for ids in tokenizers.encode(tokenizer, counter) for number in ids], np.uint32)
    if not len(tokens):
        raise InputError(f"{source} has no text: expected files with at least one document")
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return Prepared(tokenizer, tokens[:0], tokens, counter.bytes / len(tokens), Path(source), digest)


def _trained(config: Config, corpus: Corpus) -> Path:
    """Returns the path of the tokenizer trained on the corpus, training it if it is not there."""
    vocab_size = config.data.vocab_size or config.model.vocab_size
    key = fingerprint(FORMAT, corpus.config.name, vocab_size, config.data.tokenizer_bytes)
    directory = Path(config.data.data_dir).expanduser() / "tokenizers" / key
    if not directory.is_dir():
        documents = corpus.documents("train")
        trained = tokenizers.train(documents, vocab_size=vocab_size, max_bytes=config.data.tokenizer_bytes)
        with publish(directory) as partial:
            trained.save(str(partial / "tokenizer.json"))
    return directory / "tokenizer.json"


def _write(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes `train.bin`, `validation.bin`, the tokenizer and `prepared.json` into `directory`."""
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    sizes = {}
    for split in SPLITS:
        counter = _Counter(corpus.documents(split))
        with (directory / f"{split}.bin").open("wb") as file:
            for ids in tokenizers.encode(tokenizer, counter):
                np.array(ids, dtype).tofile(file)
        with (directory / f"{split}.bin").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        tokens = (directory / f"{split}.bin").stat().st_size // dtype.itemsize
        sizes[split] = {"documents": counter.documents, "bytes": counter.bytes, "tokens": tokens, "sha256": digest}
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "prepared.json").write_text(json.dumps({"dtype": dtype.name, "splits": sizes}, indent=2) + "\n")


class _Counter:
    """Passes documents on and counts them and their bytes."""

    def __init__(self, documents: Iterator[str]):
        self._source = documents
        self.documents = self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._source:
            self.documents += 1
            self.bytes += len(document.encode())
            yield document


def _open(directory: Path, tokenizer: Tokenizer) -> Prepared:
    try:
        return _opened(directory, tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{directory} holds no whole tokens ({error!r}); remove it, and the same command makes it again"
        ) from error


def _opened(directory: Path, tokenizer: Tokenizer) -> Prepared:
    meta = json.loads((directory / "prepared.json").read_text())
    train, validation = (np.memmap(directory / f"{split}.bin", meta["dtype"], mode="r") for split in SPLITS)
    held_out = meta["splits"]["validation"]
    digest = hashlib.sha256("".join(meta["splits"][split]["sha256"] for split in SPLITS).encode()).hexdigest()
    return Prepared(tokenizer, train, validation, held_out["bytes"] / held_out["tokens"], directory, digest)


def _summary(config: Config, prepared: Prepared) -> str:
    return (
        f"prepared {config.data.corpus}: {len(prepared.train):,} training and {len(prepared.validation):,} validation "
        f"tokens of {prepared.bytes_per_token:.2f} bytes, in {prepared.directory}"
    )

"""From a corpus to token shards: prepared once, found again by a fingerprint of all that they depend on."""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tokenizers import Tokenizer

from odelm.config import SPLITS, Config
from odelm.data import pool
from odelm.data import tokenizer as tokenizers
from odelm.data.corpus import Corpus, find_corpus
from odelm.data.documents import checked, text_documents
from odelm.data.files import text_files
from odelm.data.tokens import Split, Stream, Unit, dtype_of, open_split, units, write_unit
from odelm.errors import InputError
from odelm.files import fingerprint, publish, resumed, writing

FORMAT = 3
"""Part of every fingerprint: raise it when what is written changes, the sizes of records and units included."""
INDEX, TOKENIZER = "prepared.json", "tokenizer.json"


@dataclass(frozen=True, eq=False)
class Prepared:
    """A corpus as tokens, component by component, in a fixed order."""

    tokenizer: Tokenizer
    train: Split
    validation: Split
    bytes_per_token: float
    """UTF-8 bytes of the validation documents over its tokens, end-of-text tokens counted."""
    directory: Path
    digest: str
    """SHA-256, in hex, of the tokens of both splits."""

    @property
    def train_tokens(self) -> int:
        return sum(len(stream.tokens) for stream in self.train.values())


def prepare(
    config: Config,
    *,
    tokenizer_file: str | Path | None = None,
    workers: int = 0,
    beam: tfds.download.DownloadConfig | None = None,
) -> Prepared:
    """Returns the tokens of `config.data`, made on the first call and found again on the next.

    `tokenizer_file`, a tokenizer.json such as the one beside a checkpoint, stands in for the configured or
    trained tokenizer; the tokens are the same if it is a copy. A later call reads no source file, only their
    sizes and times. Any number of processes may call at once. A call that was interrupted is gone on from. `workers`
    processes share the work (0: this one does it, tokenising on all cores), or the runner of `beam` reads the files.

    Raises InputError for a source or tokenizer that cannot be used, and for a tokenizer with more tokens than
    `config.model.vocab_size`.
    """
    since = time.perf_counter()
    corpus = find_corpus(config.data, beam=beam)
    path = tokenizer_file or config.data.tokenizer
    if not path:
        path = _trained(config, corpus, workers=workers, beam=beam)
    tokenizer = tokenizers.check_size(tokenizers.load(path), config.model.vocab_size)
    tokenizers.special_id(tokenizer, "end")
    key = fingerprint(FORMAT, corpus.name, tokenizer.to_str())
    name = config.data.corpus.replace(":", "-").replace("/", "-")
    directory = Path(config.data.data_dir).expanduser() / "tokens" / f"{name}-{key}"
    made = not directory.is_dir()
    if made:
        corpus.prepare(workers=workers, beam=beam)
        with resumed(directory) as partial:
            if partial is not None:
                _write(corpus, tokenizer, partial, workers=workers)
    prepared = _open(directory, tokenizer)
    if made:
        print(_summary(config, prepared, time.perf_counter() - since), file=sys.stderr)
    return prepared


def read_text(source: str, tokenizer: Tokenizer) -> Prepared:
    """Returns the documents of files of text as the validation split, tokenised in memory; the other split is empty.

    `source` is as `config.data.source`. Raises InputError if there is no text.
    """
    files = text_files(source, option="the text")
    texts = [document.text for file in files for document in checked(text_documents(file))]
    if not texts:
        raise InputError(f"{source} has no text: expected files with at least one document")
    tokens = np.concatenate(list(tokenizers.encode(tokenizer, texts)))
    lengths = np.diff(np.flatnonzero(tokens == tokenizers.special_id(tokenizer, "end")), prepend=-1)
    size = sum(len(text.encode()) for text in texts)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return Prepared(tokenizer, {}, {"text": Stream(tokens, lengths)}, size / len(tokens), Path(source), digest)


def index(directory: Path) -> dict:
    """Returns what `prepared.json` of a directory of tokens says."""
    return json.loads((directory / INDEX).read_text())


def _trained(config: Config, corpus: Corpus, *, workers: int, beam: tfds.download.DownloadConfig | None) -> Path:
    """Returns the path of the tokenizer trained on the corpus, training it if it is not there."""
    vocab_size = config.data.vocab_size or config.model.vocab_size
    key = fingerprint(FORMAT, corpus.name, vocab_size, config.data.tokenizer_bytes)
    directory = Path(config.data.data_dir).expanduser() / "tokenizers" / key
    if not directory.is_dir():
        tokenizers.check_trainable(vocab_size)
        corpus.prepare(workers=workers, beam=beam)
        texts = (document.text for document in corpus.documents("train"))
        trained = tokenizers.train(texts, vocab_size=vocab_size, max_bytes=config.data.tokenizer_bytes)
        with publish(directory) as partial:
            trained.save(str(partial / TOKENIZER))
    return directory / TOKENIZER


def _write(corpus: Corpus, tokenizer: Tokenizer, partial: Path, *, workers: int) -> None:
    """Writes the token shards of both splits, the tokenizer and the index into `partial`/result."""
    result = partial / "result"
    by_split = {split: units(corpus, split, tokenizer, result) for split in SPLITS}
    every = [unit for split in SPLITS for unit in by_split[split]]
    todo = [unit for unit in every if not unit.report.exists()]
    pool.run(write_unit, todo, workers=workers, what="tokenising", total=len(every))
    tokenizer.save(str(result / TOKENIZER))
    splits = {split: _collected(by_split[split], corpus, split) for split in SPLITS}
    meta = {
        "corpus": corpus.name,
        "dtype": dtype_of(tokenizer).name,
        "tokenizer_sha256": _sha256(tokenizer.to_str()),
        "left_out": dict(corpus.report()),
        "splits": splits,
    }
    with writing(result / INDEX) as file:
        file.write_text(json.dumps(meta, indent=1) + "\n")


def _collected(split_units: Sequence[Unit], corpus: Corpus, split: str) -> dict:
    """Returns the reports of the units of a split and their sum; raises InputError if there is nothing in them."""
    reports = [json.loads(unit.report.read_text()) for unit in split_units]
    counts = [count for report in reports for count in report["components"].values()]
    total = {name: sum(count[name] for count in counts) for name in ("documents", "bytes", "tokens")}
    if not total["tokens"]:
        raise InputError(f"the {split} split of {corpus.name} holds no text; give more, or another data.valid_fraction")
    return {**total, "units": reports}


def _open(directory: Path, tokenizer: Tokenizer) -> Prepared:
    try:
        return _opened(directory, tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{directory} holds no whole tokens ({error!r}); remove it, and the same command makes it again"
        ) from error


def _opened(directory: Path, tokenizer: Tokenizer) -> Prepared:
    meta = index(directory)
    _check_tokenizer(directory, meta["tokenizer_sha256"], tokenizer)
    splits = {
        split: open_split(directory / split, meta["splits"][split]["units"], np.dtype(meta["dtype"]))
        for split in SPLITS
    }
    held_out = meta["splits"]["validation"]
    digest = _sha256("".join(unit["sha256"] for split in SPLITS for unit in meta["splits"][split]["units"]))
    bytes_per_token = held_out["bytes"] / held_out["tokens"]
    return Prepared(tokenizer, splits["train"], splits["validation"], bytes_per_token, directory, digest)


def _check_tokenizer(directory: Path, expected: str, tokenizer: Tokenizer) -> None:
    beside = tokenizers.load(directory / TOKENIZER).to_str()
    for what, text in ((f"{directory / TOKENIZER}", beside), ("the tokenizer", tokenizer.to_str())):
        if _sha256(text) != expected:
            raise InputError(
                f"{what} has SHA-256 {_sha256(text)[:12]}, but the tokens in {directory} were made with "
                f"{expected[:12]}; restore it, or remove {directory} to prepare anew"
            )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _summary(config: Config, prepared: Prepared, seconds: float) -> str:
    meta = index(prepared.directory)
    train, held_out = (meta["splits"][split]["tokens"] for split in SPLITS)
    left, size = meta["left_out"], sum(split["bytes"] for split in meta["splits"].values()) / 1e6
    also = "".join(f"; {left[name]} {what} left out" for name, what in LEFT_OUT if left.get(name))
    return (
        f"prepared {config.data.corpus}: {train:,} training and {held_out:,} validation tokens of "
        f"{prepared.bytes_per_token:.2f} bytes, in {prepared.directory}{also}; {size:,.1f} MB in {seconds:.1f} s"
    )


LEFT_OUT = (("duplicates", "copies"), ("bad_records", "records that cannot be read"))

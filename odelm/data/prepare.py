"""From a corpus to token shards: made once, and found again by a fingerprint of everything that they depend on."""

import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tokenizers import Tokenizer

from odelm import tokenizer as tokenizers
from odelm.config import SPLITS, Config, DataConfig
from odelm.data.corpus import Corpus, find_corpus
from odelm.data.overlap import Overlap, overlap
from odelm.data.shards import record_writer, run_jobs
from odelm.data.sources.documents import checked, text_documents
from odelm.data.sources.files import text_files
from odelm.data.tokens import INDEX, RECORD_TOKENS, TOKENIZER, Prepared, Stream, index, open_prepared, sha256
from odelm.errors import InputError
from odelm.files import data_folder, fingerprint, publish, resumed, writing

FORMAT = 3
"""Part of every fingerprint: raise it when what is written changes, the sizes of records and shards included."""
SHARD_BYTES, MAX_SHARDS = 32 << 20, 1024
LEFT_OUT = (("duplicates", "copies"), ("bad_records", "records that cannot be read"))


def prepare(
    config: Config,
    *,
    tokenizer_file: str | Path | None = None,
    workers: int = 0,
    beam: tfds.download.DownloadConfig | None = None,
) -> Prepared:
    """Returns the tokens of `config.data`, made on the first call and found again on the next.

    An interrupted call is resumed by the next one. A later call reads no source file, only their sizes and times. Any
    number of processes may call at once.

    Args:
        tokenizer_file: a tokenizer.json, such as the one beside a checkpoint, used in place of the configured or
            trained tokenizer; the tokens are the same if it is a copy.
        workers: processes that share the work; 0 is this process only, which tokenises on all cores.
        beam: reads the files with Apache Beam.

    Raises InputError for a source or tokenizer that is missing or invalid, and for a tokenizer with more tokens than
    `config.model.vocab_size`.
    """
    if config.data.task:
        raise InputError(f"data.task is {config.data.task!r}: the examples of a task are not prepared ahead of a run")
    since = time.perf_counter()
    corpus = find_corpus(config.data, beam=beam)
    path = tokenizer_file or config.data.tokenizer
    if not path:
        path = _trained_tokenizer(config, corpus, workers=workers, beam=beam)
    tokenizer = tokenizers.check_size(tokenizers.load(path), config.model.vocab_size)
    end = config.data.end_token
    tokenizers.end_id(tokenizer, end)
    key = fingerprint(FORMAT, corpus.name, tokenizer.to_str(), *([end] if end else []))
    name = config.data.corpus.replace(":", "-").replace("/", "-")
    directory = data_folder(config.data.data_dir) / "tokens" / f"{name}-{key}"
    made = not directory.is_dir()
    if made:
        corpus.prepare(workers=workers, beam=beam)
        with resumed(directory) as partial:
            if partial is not None:
                _write(corpus, tokenizer, end, partial, workers=workers)
    prepared = open_prepared(directory, tokenizer)
    if made:
        print(_summary(config, prepared, time.perf_counter() - since), file=sys.stderr)
    return _with_validation(prepared, config.data) if config.data.valid_source else prepared


def _with_validation(prepared: Prepared, data: DataConfig) -> Prepared:
    """Returns the tokens with the documents of `data.valid_source` as the held-out split."""
    own = read_text(data.valid_source, prepared.tokenizer, data, option="data.valid_source")
    digest = sha256(prepared.digest + own.digest)
    return dataclasses.replace(prepared, validation=own.validation, bytes_per_token=own.bytes_per_token, digest=digest)


def read_text(
    source: str, tokenizer: Tokenizer, data: DataConfig | None = None, *, option: str = "the text"
) -> Prepared:
    """Returns the documents of text files as the validation split, tokenised in memory; the other split is empty.

    `source` is given as in `config.data.source`; only the field and the end token of `data` are used. Raises InputError
    if there is no text.
    """
    data = DataConfig() if data is None else data
    end = data.end_token
    files = text_files(source, option=option)
    texts = [document.text for file in files for document in checked(text_documents(file, data.text_field))]
    if not texts:
        raise InputError(f"{source} has no text: expected files with at least one document")
    tokens = np.concatenate(list(tokenizers.encode(tokenizer, texts, end=end)))
    lengths = np.diff(np.flatnonzero(tokens == tokenizers.end_id(tokenizer, end)), prepend=-1)
    size = sum(len(text.encode()) for text in texts)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return Prepared(tokenizer, {}, {"text": Stream(tokens, lengths)}, size / len(tokens), Path(source), digest)


@dataclass(frozen=True)
class TokenShard:
    """Documents `start` to `stop` of a split of a corpus, to be written to `path`."""

    corpus: Corpus
    split: str
    start: int
    stop: int
    tokenizer: str
    """As JSON, which can be passed to another process."""
    end: str
    """The name of the token that ends a document, empty for the usual one."""
    path: Path

    @property
    def report(self) -> Path:
        """Written last: a shard that has its report is complete."""
        return self.path.with_suffix(".json")


def token_shards(corpus: Corpus, split: str, tokenizer: Tokenizer, end: str, directory: Path) -> list[TokenShard]:
    """Returns the shards of a split, which depend on the corpus only."""
    documents, size = corpus.size(split)
    count = max(1, min(-(-size // SHARD_BYTES), MAX_SHARDS, documents))
    cuts = [documents * number // count for number in range(count + 1)]
    text, corpus = tokenizer.to_str(), corpus.reader()
    return [
        TokenShard(corpus, split, start, stop, text, end, directory / split / f"{number:05d}.array_record")
        for number, (start, stop) in enumerate(itertools.pairwise(cuts))
    ]


def write_token_shard(shard: TokenShard) -> None:
    """Writes the tokens of a shard, the lengths of its documents, and a report of both."""
    tokenizer = Tokenizer.from_str(shard.tokenizer)
    texts: dict[str, list[str]] = {}
    for document in shard.corpus.documents(shard.split, shard.start, shard.stop):
        texts.setdefault(document.component, []).append(document.text)
    texts = {name: texts[name] for name in sorted(texts)}
    tokens, ends = _encoded(tokenizer, texts, shard.end)
    stops = [0, *(int(ends[count - 1]) for count in np.cumsum([len(documents) for documents in texts.values()]))]
    pieces = dict(zip(texts, itertools.pairwise(stops), strict=True))
    with writing(shard.path) as partial, record_writer(partial, compress=False) as writer:
        for start, stop in pieces.values():
            for first in range(start, stop, RECORD_TOKENS):
                writer.write(tokens[first : min(first + RECORD_TOKENS, stop)].tobytes())
    with writing(shard.path.with_suffix(".lengths")) as partial:
        np.diff(ends, prepend=0).astype("<u4").tofile(partial)
    report = {
        "file": shard.path.name,
        "size": shard.path.stat().st_size,
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "components": {name: _counts(texts[name], *pieces[name]) for name in texts},
    }
    with writing(shard.report) as partial:
        partial.write_text(json.dumps(report) + "\n")


def _encoded(tokenizer: Tokenizer, texts: Mapping[str, list[str]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of all texts, one component after the other, and where each text's tokens end."""
    dtype, end = _dtype_of(tokenizer), tokenizers.end_id(tokenizer, name)
    runs = tokenizers.encode(tokenizer, itertools.chain.from_iterable(texts.values()), end=name)
    tokens = np.concatenate([np.empty(0, dtype), *runs]).astype(dtype)
    ends = np.flatnonzero(tokens == end) + 1
    if len(ends) != sum(len(documents) for documents in texts.values()):
        raise InputError(
            f"the tokenizer's end token {tokenizer.id_to_token(end)!r} is also produced by text, so the ends of "
            "documents are unknown; use a tokenizer that has it as a special token"
        )
    return tokens, ends


def _counts(texts: Sequence[str], start: int, stop: int) -> dict[str, int]:
    return {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts), "tokens": stop - start}


def _dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Returns the smallest unsigned type that holds the tokenizer's ids."""
    return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)


def _trained_tokenizer(
    config: Config, corpus: Corpus, *, workers: int, beam: tfds.download.DownloadConfig | None
) -> Path:
    """Returns the path of the tokenizer trained on the corpus, training it if it is not there."""
    vocab_size = config.data.vocab_size or config.model.vocab_size
    key = fingerprint(FORMAT, corpus.name, vocab_size, config.data.tokenizer_bytes)
    directory = data_folder(config.data.data_dir) / "tokenizers" / key
    if not directory.is_dir():
        tokenizers.check_trainable(vocab_size)
        corpus.prepare(workers=workers, beam=beam)
        texts = (document.text for document in corpus.documents("train"))
        trained = tokenizers.train(texts, vocab_size=vocab_size, max_bytes=config.data.tokenizer_bytes)
        with publish(directory) as partial:
            trained.save(str(partial / TOKENIZER))
    return directory / TOKENIZER


def _write(corpus: Corpus, tokenizer: Tokenizer, end: str, partial: Path, *, workers: int) -> None:
    """Writes the token shards of both splits, the tokenizer and the index into `partial`/result."""
    result = partial / "result"
    by_split = {split: token_shards(corpus, split, tokenizer, end, result) for split in SPLITS}
    every = [shard for split in SPLITS for shard in by_split[split]]
    missing = [shard for shard in every if not shard.report.exists()]
    run_jobs(write_token_shard, missing, workers=workers, what="tokenising", total=len(every))
    tokenizer.save(str(result / TOKENIZER))
    splits = {split: _collected(by_split[split], corpus, split) for split in SPLITS}
    meta = {
        "corpus": corpus.name,
        "dtype": _dtype_of(tokenizer).name,
        "tokenizer_sha256": sha256(tokenizer.to_str()),
        "left_out": dict(corpus.report()),
        "splits": splits,
    }
    _write_index(result, meta)
    prepared = open_prepared(result, tokenizer)
    _write_index(result, meta | {"overlap": dataclasses.asdict(overlap(prepared.train, prepared.validation))})


def _write_index(directory: Path, meta: dict) -> None:
    with writing(directory / INDEX) as file:
        file.write_text(json.dumps(meta, indent=1) + "\n")


def _collected(shards: Sequence[TokenShard], corpus: Corpus, split: str) -> dict:
    """Returns the reports of a split's shards and their sums; raises InputError if there is no text in them."""
    reports = [json.loads(shard.report.read_text()) for shard in shards]
    counts = [count for report in reports for count in report["components"].values()]
    total = {name: sum(count[name] for count in counts) for name in ("documents", "bytes", "tokens")}
    if not total["tokens"]:
        raise InputError(f"the {split} split of {corpus.name} has no text; give more, or another data.valid_fraction")
    return {**total, "units": reports}


def _summary(config: Config, prepared: Prepared, seconds: float) -> str:
    meta = index(prepared.directory)
    train, held_out = (meta["splits"][split]["tokens"] for split in SPLITS)
    left, size = meta["left_out"], sum(split["bytes"] for split in meta["splits"].values()) / 1e6
    also = "".join(f"; {left[name]} {what} left out" for name, what in LEFT_OUT if left.get(name))
    return (
        f"prepared {config.data.corpus}: {train:,} training and {held_out:,} validation tokens of "
        f"{prepared.bytes_per_token:.2f} bytes, in {prepared.directory}{also}; {Overlap(**meta['overlap'])}; "
        f"{size:,.1f} MB in {seconds:.1f} s"
    )

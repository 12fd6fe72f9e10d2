"""How fast text becomes tokens and tokens become batches, and what memory a long pass takes.

python benchmarks/data_speed.py [--corpus=text --source=DIR --data_dir=DIR --repeats=5 --batches=2000 --data_workers=2]

Tokenising is held against the tokenizers library alone, on one core, taking turns, in CPU seconds. Batches are of
32,768 places, of which those that hold a token count, their cores the CPU seconds of this process over the seconds.
Prints one JSON object.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks import run_program
from benchmarks.options import whole
from odelm.config import SPLITS, Config, replace
from odelm.data.corpus import Corpus, find_corpus
from odelm.data.loader import train_batches
from odelm.data.prepare import prepare, token_shards, write_token_shard
from odelm.data.sources.documents import Document
from odelm.data.tokens import Prepared

PLACES = 32_768
"""A batch."""
PAGE = resource.getpagesize()


@dataclass(frozen=True)
class Some:
    """The first documents of a corpus, held in memory, as a corpus."""

    texts: tuple[Document, ...]
    name: str = "some"

    def prepare(self, **options: object) -> None: ...

    def reader(self) -> "Some":
        return self

    def report(self) -> dict[str, object]:
        return {}

    def size(self, split: str) -> tuple[int, int]:
        return len(self.texts), 1

    def documents(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        return iter(self.texts)


def first_documents(corpus: Corpus, size: int) -> Some:
    found, total = [], 0
    for document in corpus.documents("train"):
        if total >= size:
            break
        found.append(document)
        total += len(document.text.encode())
    return Some(tuple(found))


def cpu_seconds(work: Callable[[], object]) -> float:
    since = time.process_time()
    work()
    return time.process_time() - since


def tokenising(some: Some, tokenizer: Tokenizer, repeats: int) -> dict[str, float]:
    """Returns MB a second of one core: of the library, of a written token shard, and their ratio."""
    texts = [document.text for document in some.texts]
    size = sum(len(text.encode()) for text in texts) / 1e6
    alone, written = [], []
    with tempfile.TemporaryDirectory() as folder:
        (shard,) = token_shards(some, SPLITS[0], tokenizer, "", Path(folder))
        for _ in range(repeats):
            # A new one, as every shard has: a tokenizer keeps the words that it met.
            new = Tokenizer.from_str(tokenizer.to_str())
            alone.append(cpu_seconds(lambda: new.encode_batch_fast(texts, add_special_tokens=False)))  # noqa: B023
            written.append(cpu_seconds(lambda: write_token_shard(shard)))
    ratios = [ours / library for ours, library in zip(written, alone, strict=True)]
    return {
        "megabytes": size,
        "library_mb_per_s": size / statistics.median(alone),
        "shard_mb_per_s": size / statistics.median(written),
        "shard_over_library": statistics.median(ratios),
    }


def loading(prepared: Prepared, config: Config, count: int) -> dict[str, object]:
    """Returns tokens a second, cores busy, and resident memory in MB over the pass."""
    batches = train_batches(prepared, config)
    for _ in itertools.islice(batches, 20):
        pass
    memory, tokens = [], 0
    since, cpu = time.perf_counter(), time.process_time()
    for number, batch in enumerate(itertools.islice(batches, count)):
        tokens += int(batch["mask" if "mask" in batch else "weights"].sum())
        if number % max(1, count // 10) == 0:
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE // 2**20)
    seconds = time.perf_counter() - since
    return {
        "million_tokens_per_s": tokens / seconds / 1e6,
        "cores": (time.process_time() - cpu) / seconds,
        "places_filled": tokens / (count * PLACES),
        "resident_mb": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="python_source")
    parser.add_argument("--source", default="")
    parser.add_argument("--data_dir", default=Config().data.data_dir)
    parser.add_argument("--exclude", default="", help="a part of the corpus to leave out")
    parser.add_argument("--vocab_size", type=whole, default=16_384)
    parser.add_argument("--megabytes", type=whole, default=16)
    parser.add_argument("--repeats", type=whole, default=5)
    parser.add_argument("--batches", type=whole, default=2000)
    parser.add_argument("--data_workers", type=int, default=0)
    options = parser.parse_args()
    # One core, as a worker of `prepare` has it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    config = Config()
    config = replace(
        config, {"data.corpus": options.corpus, "data.source": options.source, "data.data_dir": options.data_dir}
    )
    config = replace(config, {"data.exclude": (options.exclude,) if options.exclude else ()})
    config = replace(config, {"data.vocab_size": options.vocab_size, "data.workers": options.data_workers})
    config = replace(config, {"model.vocab_size": options.vocab_size})
    prepared = prepare(config)
    some = first_documents(find_corpus(config.data), options.megabytes * 10**6)
    results: dict[str, object] = {"tokenising": tokenising(some, prepared.tokenizer, options.repeats)}
    for kind, packing, unit, length in (
        ("decoder", "concatenate", "token", 1024),
        ("decoder", "segments", "token", 1024),
        ("decoder", "documents", "token", 1024),
        ("encoder", "concatenate", "token", 1024),
        ("encoder", "documents", "span", 1024),
        ("encoder", "concatenate", "token", 128),
        ("encoder", "documents", "token", 128),
    ):
        config = replace(config, {"model.kind": kind, "data.packing": packing, "data.mask_unit": unit})
        config = replace(config, {"model.max_length": length, "train.length": length})
        config = replace(config, {"train.batch_size": PLACES // length})
        results[f"{kind}, {packing}, {unit}, {length}"] = loading(prepared, config, options.batches)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    run_program(main)

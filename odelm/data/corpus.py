"""A corpus in two splits: prepared once, then read at any place."""

import contextlib
import dataclasses
import functools
import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import tensorflow_datasets as tfds

from odelm.config import DataConfig
from odelm.data.one_text import OneText
from odelm.data.shards import as_os_error, run_jobs
from odelm.data.sources.catalogue import PREFIX, open_catalogue
from odelm.data.sources.corpora import BUILDERS, Text
from odelm.data.sources.document_shards import (
    DocumentShard,
    Reading,
    Source,
    group,
    open_document_shards,
    write_document_shard,
)
from odelm.data.sources.documents import Document
from odelm.data.sources.files import TXT_ENDINGS, stats
from odelm.data.sources.tfds import CorpusBuilder, CorpusConfig, quiet
from odelm.errors import InputError
from odelm.files import data_folder, fingerprint, resumed

FORMAT = 3
"""Part of every corpus's name: raise it when what is written changes."""
REPORT = "corpus.json"


class Corpus(Protocol):
    """Documents in two splits."""

    @property
    def name(self) -> str:
        """Identifies everything that the documents depend on."""
        ...

    def prepare(self, *, workers: int = 0, beam: tfds.download.DownloadConfig | None = None) -> None:
        """Makes the documents readable unless they already are; `beam` does it with Apache Beam."""
        ...

    def size(self, split: str) -> tuple[int, int]:
        """Returns about how many documents a split has, and about how many bytes."""
        ...

    def documents(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        """Yields the documents numbered `start` to `stop`, among those that `size` counts."""
        ...

    def reader(self) -> "Corpus":
        """Returns the prepared corpus without the data that only preparing needs."""
        ...

    def report(self) -> Mapping[str, object]:
        """Returns what preparing left out: the counts `duplicates` and `bad_records`, and the first messages, `bad`."""
        ...


def find_corpus(config: DataConfig, *, beam: tfds.download.DownloadConfig | None = None) -> Corpus:
    """Returns the corpus that `config` names. A corpus of the TFDS catalogue is prepared here, with `beam` if given.

    A single text file is one document, so its last part is held out; every other corpus is split by documents. No
    document is read; the name of a corpus of files depends on their paths, sizes and times. Raises InputError if the
    source is missing or has no supported file.
    """
    if config.corpus.startswith(PREFIX):
        return open_catalogue(config, beam)
    builder = BUILDERS[config.corpus]
    sources = builder.sources(config.source)
    chosen = [config.components, config.exclude, config.on_bad_record, config.valid_fraction]
    if config.text_field != "text":
        chosen.append(config.text_field)
    key = fingerprint(FORMAT, stats(sorted({source.path for source in sources})), *chosen)
    prefix = config.corpus
    if config.corpus == "python_source":
        prefix = f"{sys.implementation.name}-{platform.python_version()}"
    if config.corpus == "text" and len(sources) == 1 and not (config.components or config.exclude):
        path = sources[0].path
        if path.name.lower().endswith(TXT_ENDINGS):
            return OneText(f"{prefix}-one-{key}", path, config.valid_fraction)
    return FileCorpus(builder, config, tuple(sources), f"{prefix}-{key}")


@dataclasses.dataclass(frozen=True)
class FileCorpus:
    """A corpus of local files, kept as a TFDS dataset under the data directory."""

    builder: type[CorpusBuilder]
    config: DataConfig
    sources: tuple[Source, ...]
    name: str

    @property
    def directory(self) -> Path:
        return data_folder(self.config.data_dir) / "corpora" / self.name

    def prepare(self, *, workers: int = 0, beam: tfds.download.DownloadConfig | None = None) -> None:
        with resumed(self.directory) as partial:
            if partial is None:
                return
            result = partial / "result"
            shutil.rmtree(result, ignore_errors=True)
            settings = self._settings(partial / "parts", workers=workers, with_beam=beam is not None)
            how = beam or tfds.download.DownloadConfig()
            how = how.replace(try_download_gcs=False)
            with quiet(), _named_split(self), as_os_error():
                builder = self.builder(data_dir=result, config=settings)
                builder.download_and_prepare(file_format="array_record", download_config=how)
            (result / REPORT).write_text(json.dumps(_left_out(settings), indent=2) + "\n")

    def size(self, split: str) -> tuple[int, int]:
        info = self._opened().info.splits[split]
        return info.num_examples, info.num_bytes

    def documents(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        source = self._opened().as_data_source(split)  # pyright: ignore[reportCallIssue] (TFDS decorates it untyped)
        for index in range(start, len(source) if stop is None else stop):
            values = source[index]
            yield Document(values["text"].decode(), values[self.builder.label].decode())

    def reader(self) -> "FileCorpus":
        return dataclasses.replace(self, sources=())

    def report(self) -> Mapping[str, object]:
        return json.loads((self.directory / REPORT).read_text())

    def _opened(self) -> tfds.core.DatasetBuilder:
        with quiet():
            settings = CorpusConfig(name=self.name, valid_fraction=self.config.valid_fraction)
            return self.builder(data_dir=self.directory, config=settings)

    def _settings(self, folder: Path, *, workers: int, with_beam: bool) -> CorpusConfig:
        """Returns the builder's settings, after reading the files into shards unless Beam is to read them."""
        config, groups = self.config, group(self.sources)
        read = functools.partial(Text.read, field=config.text_field) if config.corpus == "text" else self.builder.read
        reading = Reading(read, config.components, config.exclude, config.on_bad_record == "skip")
        settings = CorpusConfig(name=self.name, valid_fraction=config.valid_fraction)
        if with_beam:
            return dataclasses.replace(settings, groups=tuple(groups), reading=reading)
        shards = [DocumentShard(number, sources, reading, folder) for number, sources in enumerate(groups)]
        missing = [shard for shard in shards if not shard.report.exists()]
        run_jobs(write_document_shard, missing, workers=workers, what="reading", total=len(shards))
        return dataclasses.replace(settings, shards=open_document_shards(shards))


@contextlib.contextmanager
def _named_split(corpus: FileCorpus) -> Iterator[None]:
    """Turns TFDS's error for an empty split, which it raises with Beam, into an InputError."""
    try:
        yield
    except ValueError as error:
        found = re.search(r"examples is 0 for split (\w+)", str(error))
        if found is None:
            raise
        raise InputError(
            f"no document of {corpus.sources[0].path} and what comes with it fell into the {found[1]} split: change "
            f"data.valid_fraction (now {corpus.config.valid_fraction}) or give more, shorter documents"
        ) from error


def _left_out(settings: CorpusConfig) -> dict[str, object]:
    shards = settings.shards
    if shards is None:
        return {"duplicates": None, "bad_records": None, "bad": []}
    return {
        "duplicates": int((~shards.first).sum()),
        "bad_records": sum(report["bad_records"] for report in shards.reports),
        "bad": [line for report in shards.reports for line in report["bad"]][:100],
    }

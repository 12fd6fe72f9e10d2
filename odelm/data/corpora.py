"""Corpora as TFDS builders, written to ArrayRecord and read back without TensorFlow."""

import contextlib
import dataclasses
import io
import logging
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import gcs_utils

from odelm.config import DataConfig, fingerprint
from odelm.data.cache import publish
from odelm.data.documents import is_held_out, python_documents, text_documents
from odelm.data.files import python_files, stats, text_files
from odelm.errors import InputError

SPLITS = ("train", "validation")

# A builder asks a public bucket for metadata of datasets with its name; ours are local.
gcs_utils._is_gcs_disabled = True


@dataclasses.dataclass(eq=False)
class CorpusConfig(tfds.core.BuilderConfig):
    """Which files a corpus is made of, and the share of documents held out."""

    files: tuple[Path, ...] = ()
    valid_fraction: float = 0.02


class _Corpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents {"text": bytes} in the splits "train" and "validation", in TFDS's fixed shuffled order."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}
    """Checksums of downloads: none, and TFDS need not look for a file of them."""

    @property
    def _settings(self) -> CorpusConfig:
        return cast(CorpusConfig, self.builder_config)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager) -> dict:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        chosen = total = 0
        for number, path in enumerate(self._settings.files):
            for part, text in enumerate(self._documents(path)):
                total += 1
                if is_held_out(text, self._settings.valid_fraction) == (split == "validation"):
                    chosen += 1
                    yield f"{number}-{part}", {"text": text}
        if not chosen:
            raise InputError(self._why_empty(split, total))

    def _documents(self, path: Path) -> Iterator[str]:
        raise NotImplementedError

    def _why_empty(self, split: str, total: int) -> str:
        files = self._settings.files
        if not total:
            return f"the corpus is empty: no text in {len(files)} files such as {files[0]}"
        change = "raise" if split == "validation" else "lower"
        return (
            f"no document fell into the {split} split ({total} in all, from {files[0]} on): {change} "
            f"data.valid_fraction (now {self._settings.valid_fraction}) or give more, shorter documents"
        )


class PythonSource(_Corpus):
    """The standard library of the running interpreter, a document a file."""

    def _documents(self, path: Path) -> Iterator[str]:
        return python_documents(path)


class Text(_Corpus):
    """The user's own .txt and .jsonl files."""

    def _documents(self, path: Path) -> Iterator[str]:
        return text_documents(path)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus that is prepared when its documents are first asked for."""

    builder: type[_Corpus]
    config: CorpusConfig
    directory: Path

    def documents(self, split: str) -> Iterator[str]:
        """Yields the documents of `split`; raises InputError if the source cannot be prepared."""
        if not self.directory.is_dir():
            with publish(self.directory) as partial, _quiet():
                self.builder(data_dir=partial, config=self.config).download_and_prepare(
                    file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
        with _quiet():
            builder = self.builder(data_dir=self.directory, config=self.config)
            source = builder.as_data_source(split)  # pyright: ignore[reportCallIssue] (TFDS decorates it untyped)
        return (source[index]["text"].decode() for index in range(len(source)))


def find_corpus(config: DataConfig) -> Corpus:
    """Returns the corpus that `config` names; its directory is keyed by the paths, sizes and times of its files.

    Reads no file. Raises InputError if the source is missing or has no supported file.
    """
    if config.corpus == "python_source":
        builder, files = PythonSource, python_files()
        prefix = f"{sys.implementation.name}-{platform.python_version()}"
    else:
        builder, files, prefix = Text, text_files(config.source), "text"
    name = f"{prefix}-{fingerprint(stats(files), config.valid_fraction)}"
    settings = CorpusConfig(name=name, files=tuple(files), valid_fraction=config.valid_fraction)
    return Corpus(builder, settings, Path(config.data_dir).expanduser() / "corpora" / name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS's bars, notes and printing; `odelm.data.prepare` reports in one line."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

"""Corpora as TFDS datasets: the base of our builders, and TFDS without its progress bars."""

import contextlib
import functools
import io
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import gcs_utils

from odelm.config import SPLITS
from odelm.data.sources.document_shards import (
    DocumentShard,
    DocumentShards,
    Reading,
    Source,
    check_components,
    group,
    open_document_shards,
    records,
    write_document_shard,
)
from odelm.data.sources.documents import BadRecord, Records, digest, is_held_out
from odelm.errors import InputError

NAMES = "names"

# A builder asks a public bucket for metadata of datasets with its name; ours are local.
gcs_utils._is_gcs_disabled = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences TFDS's bars, notes and printing."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@dataclass(eq=False)
class CorpusConfig(tfds.core.BuilderConfig):
    """How a corpus is built: the share of documents held out, and where they come from.

    They come from `shards`, if the files were read before; else from `groups` of sources by Apache Beam, on as many
    machines as its runner has; without either, from the files in TFDS's manual directory.
    """

    valid_fraction: float = 0.02
    shards: DocumentShards | None = field(default=None, repr=False)
    groups: tuple[tuple[Source, ...], ...] = field(default=(), repr=False)
    reading: Reading | None = field(default=None, repr=False)


class CorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents in the splits "train" and "validation", each once, in TFDS's order of their digests."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = [CorpusConfig(name="default")]
    url_infos = {}
    """Checksums of downloads: there are none, so TFDS need not look for a file of them."""
    label: ClassVar[str] = "component"
    """Name of the feature that holds a document's component."""
    description: ClassVar[str]
    citation: ClassVar[str] = ""
    homepage: ClassVar[str] = ""

    @staticmethod
    def sources(source: str) -> list[Source]:
        """Returns the files of the corpus under `source`; raises InputError if there are none."""
        raise NotImplementedError

    @staticmethod
    def read(source: Source) -> Records:
        """Yields the records of one source."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"text": text(), self.label: text()}),
            description=self.description,
            citation=self.citation or None,
            homepage=self.homepage or None,
        )

    def _split_generators(self, dl_manager) -> dict[str, Any]:
        settings = cast(CorpusConfig, self.builder_config)
        if settings.groups:
            return {split: self._with_beam(split, settings) for split in SPLITS}
        shards = settings.shards
        if shards is None:
            shards = self._read(str(dl_manager.manual_dir) if self.MANUAL_DOWNLOAD_INSTRUCTIONS else "")
        return {split: self._examples(split, shards, settings.valid_fraction) for split in SPLITS}

    def _generate_examples(self) -> Any:
        raise NotImplementedError("the splits are made by _split_generators")

    def _read(self, source: str) -> DocumentShards:
        """Returns the corpus, read into a folder that is removed with the builder."""
        self._folder = tempfile.TemporaryDirectory()
        groups = enumerate(group(self.sources(source)))
        folder, reading = Path(self._folder.name), Reading(self.read)
        shards = [DocumentShard(number, sources, reading, folder) for number, sources in groups]
        for shard in shards:
            write_document_shard(shard)
        return open_document_shards(shards)

    def _examples(self, split: str, shards: DocumentShards, fraction: float) -> Iterator[tuple[str, dict[str, str]]]:
        chosen = shards.chosen(split == "validation", fraction)
        if not chosen.any():
            raise InputError(_why_empty(split, shards, fraction))
        for key, document in shards.documents(chosen):
            yield key, {"text": document.text, self.label: document.component}

    def _with_beam(self, split: str, settings: CorpusConfig) -> Any:
        import apache_beam as beam  # pyright: ignore[reportMissingImports] (an extra)

        held_out, reading = split == "validation", settings.reading
        assert reading is not None
        read = functools.partial(_keyed, reading=reading, held_out=held_out, fraction=settings.valid_fraction)
        check = functools.partial(check_components, reading)

        @beam.ptransform_fn
        def documents(pipeline: Any) -> Any:
            groups = pipeline | beam.Create(list(enumerate(settings.groups))) | "Spread" >> beam.Reshuffle()
            found = groups | "Read" >> beam.FlatMap(read).with_outputs(NAMES, main="documents")
            _ = found[NAMES] | "Each name" >> beam.Distinct() | beam.combiners.ToList() | "Known" >> beam.Map(check)
            return (
                found["documents"]
                | "First of each" >> beam.CombinePerKey(min)
                | "Example" >> beam.MapTuple(functools.partial(_example, label=self.label))
            )

        return documents()  # pyright: ignore[reportCallIssue] (Beam gives the pipeline)


def _keyed(
    numbered: tuple[int, tuple[Source, ...]], *, reading: Reading, held_out: bool, fraction: float
) -> Iterator[Any]:
    """Yields (digest in hex, (group, place in it, text, component)) of the documents of one split of a group, and the
    names of all components that it has, tagged."""
    from apache_beam.pvalue import TaggedOutput  # pyright: ignore[reportMissingImports] (an extra)

    number, sources = numbered
    names = set()
    for place, record in enumerate(records(sources, reading)):
        if isinstance(record, BadRecord):
            continue
        if record.component not in names:
            names.add(record.component)
            yield TaggedOutput(NAMES, record.component)
        if not reading.keeps(record.component):
            continue
        key = digest(record.text)
        if is_held_out(key, fraction) == held_out:
            yield key.hex(), (number, place, record.text, record.component)


def _example(key: str, found: tuple[int, int, str, str], *, label: str) -> tuple[str, dict[str, str]]:
    return key, {"text": found[2], label: found[3]}


def _why_empty(split: str, shards: DocumentShards, fraction: float) -> str:
    total, first = int(shards.first.sum()), shards.shards[0].sources[0].path
    if not total:
        return f"the corpus is empty: no text in {first} and what comes with it"
    change = "raise" if split == "validation" else "lower"
    return (
        f"no document fell into the {split} split ({total} in all, from {first} on): {change} data.valid_fraction "
        f"(now {fraction}) or give more, shorter documents"
    )

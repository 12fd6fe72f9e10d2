"""The corpora as TFDS builders: where their documents are found, how they are read, and their cards."""

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import gcs_utils

from odelm.config import SPLITS
from odelm.data import archives
from odelm.data.documents import (
    BadRecord,
    Records,
    digest,
    is_held_out,
    labelled,
    pile_documents,
    python_documents,
    text_documents,
)
from odelm.data.files import ENDINGS, JSONL_ENDINGS, find_files, python_files, text_files
from odelm.data.parts import (
    PartJob,
    Parts,
    Reading,
    Source,
    check_components,
    group,
    read_parts,
    records,
    whole,
    write_part,
)
from odelm.errors import InputError

NAMES = "names"

# A builder asks a public bucket for metadata of datasets with its name; ours are local.
gcs_utils._is_gcs_disabled = True


@dataclass(eq=False)
class CorpusConfig(tfds.core.BuilderConfig):
    """How a corpus is built: the share of documents held out, and where they come from.

    From `parts`, which were read before; else from `groups` of sources by Apache Beam, on as many machines as its
    runner has; without either from the files of TFDS's manual directory.
    """

    valid_fraction: float = 0.02
    parts: Parts | None = field(default=None, repr=False)
    groups: tuple[tuple[Source, ...], ...] = field(default=(), repr=False)
    reading: Reading | None = field(default=None, repr=False)


class CorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents in the splits "train" and "validation", each once, in TFDS's order of their digests."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = [CorpusConfig(name="default")]
    url_infos = {}
    """Checksums of downloads: none, and TFDS need not look for a file of them."""
    label: ClassVar[str] = "component"
    """The feature that says which part of the corpus a document is from."""
    description: ClassVar[str]
    citation: ClassVar[str] = ""
    homepage: ClassVar[str] = ""

    @staticmethod
    def sources(source: str) -> list[Source]:
        """Returns the files of the corpus under `source`; raises InputError if there are none."""
        raise NotImplementedError

    @staticmethod
    def read(source: Source) -> Records:
        """Yields the records of one of them."""
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
        parts = settings.parts
        if parts is None:
            parts = self._read(str(dl_manager.manual_dir) if self.MANUAL_DOWNLOAD_INSTRUCTIONS else "")
        return {split: self._from_parts(split, parts, settings.valid_fraction) for split in SPLITS}

    def _generate_examples(self) -> Any:
        raise NotImplementedError("the splits are made by _split_generators")

    def _read(self, source: str) -> Parts:
        """Returns the corpus read into a folder that goes when the builder does."""
        self._folder = tempfile.TemporaryDirectory()
        groups = enumerate(group(self.sources(source)))
        jobs = [PartJob(number, part, Reading(self.read), Path(self._folder.name)) for number, part in groups]
        for job in jobs:
            write_part(job)
        return read_parts(jobs)

    def _from_parts(self, split: str, parts: Parts, fraction: float) -> Iterator[tuple[str, dict[str, str]]]:
        chosen = parts.chosen(split == "validation", fraction)
        if not chosen.any():
            raise InputError(_why_empty(split, parts, fraction))
        for key, document in parts.documents(chosen):
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


class PythonSource(CorpusBuilder):
    """The standard library of the running interpreter, a document a file."""

    description = "The source files of the running Python interpreter's standard library, a document a file."
    citation = "Python Software Foundation. The Python Standard Library. Python Software Foundation License."
    homepage = "https://docs.python.org/3/library"

    @staticmethod
    def sources(source: str) -> list[Source]:
        return whole(python_files())

    @staticmethod
    def read(source: Source) -> Records:
        return python_documents(source.path, "python_source")


class Text(CorpusBuilder):
    """The user's own .txt and .jsonl files."""

    description = "Text files, a document each, and JSON lines with a field `text`, a document a line."
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"The directory holds the files, in folders or not: {', '.join(ENDINGS)}."

    @staticmethod
    def sources(source: str) -> list[Source]:
        return whole(text_files(source))

    @staticmethod
    def read(source: Source) -> Records:
        return text_documents(source.path)


class OpenWebText(CorpusBuilder):
    """OpenWebText from its archive, the folder that it unpacks to, or JSON lines."""

    description = (
        "Web pages linked from Reddit posts with three or more upvotes, in the manner of the WebText that GPT-2 was "
        "trained on: about 8 million documents, 38 GB of text."
    )
    citation = (
        "@misc{Gokaslan2019OpenWeb, title={OpenWebText Corpus}, author={Gokaslan, Aaron and Cohen, Vanya}, "
        "howpublished={http://Skylion007.github.io/OpenWebTextCorpus}, year={2019}}"
    )
    homepage = "https://skylion007.github.io/OpenWebTextCorpus"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download the archive (openwebtext.tar.xz, about 12 GB) by the links on "
        "https://skylion007.github.io/OpenWebTextCorpus and put it into the directory as it is, or unpack it there "
        "once, to the folder `openwebtext` with files urlsf_subset*_data.xz. The corpus as JSON lines with a field "
        "`text` (.jsonl, plain or compressed) is read too."
    )

    @staticmethod
    def sources(source: str) -> list[Source]:
        files = find_files(source, (*archives.OUTER, archives.INNER, *ENDINGS))
        found = []
        for file in files:
            found += archives.members(file) if file.name.endswith(archives.OUTER) else whole([file])
        return found

    @staticmethod
    def read(source: Source) -> Records:
        if source.path.name.endswith(archives.OUTER):
            return archives.outer_documents(source)
        if source.path.name.endswith(archives.INNER):
            return archives.extracted_documents(source.path)
        return labelled(text_documents(source.path), archives.COMPONENT)


class Pile(CorpusBuilder):
    """The Pile from its shards, the name of each document's set kept."""

    label = "pile_set_name"
    description = "Text of 22 sets, from books and papers to code and web pages: 825 GiB in English."
    citation = (
        "@article{gao2020pile, title={The Pile: An 800GB Dataset of Diverse Text for Language Modeling}, "
        "author={Gao, Leo and Biderman, Stella and Black, Sid and others}, journal={arXiv preprint arXiv:2101.00027}, "
        "year={2020}}"
    )
    homepage = "https://pile.eleuther.ai"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the training shards (00.jsonl.zst to 29.jsonl.zst, or some of them) into the directory. Each line is "
        '{"text": ..., "meta": {"pile_set_name": ...}}. The held-out split is made from them, by a hash of each '
        "document: leave the Pile's own validation and test shards elsewhere."
    )

    @staticmethod
    def sources(source: str) -> list[Source]:
        return whole(find_files(source, JSONL_ENDINGS))

    @staticmethod
    def read(source: Source) -> Records:
        return pile_documents(source.path)


BUILDERS: dict[str, type[CorpusBuilder]] = {
    "python_source": PythonSource,
    "text": Text,
    "openwebtext": OpenWebText,
    "pile": Pile,
}


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


def _why_empty(split: str, parts: Parts, fraction: float) -> str:
    total, first = int(parts.first.sum()), parts.jobs[0].sources[0].path
    if not total:
        return f"the corpus is empty: no text in {first} and what comes with it"
    change = "raise" if split == "validation" else "lower"
    return (
        f"no document fell into the {split} split ({total} in all, from {first} on): {change} data.valid_fraction "
        f"(now {fraction}) or give more, shorter documents"
    )

"""Any text corpus of the TFDS catalogue, by its name (`tfds:lm1b`), prepared by the catalogue's own code."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import tensorflow_datasets as tfds
from tensorflow_datasets.core.registered import DatasetNotFoundError

from odelm.config import DataConfig
from odelm.data.sources.documents import Document, digest, is_held_out
from odelm.data.sources.files import stats
from odelm.data.sources.tfds import quiet
from odelm.errors import InputError, nearest
from odelm.files import data_folder, fingerprint, only_one, resumed

PREFIX = "tfds:"
TRAIN, HELD_OUT = "train", ("validation", "test")


@dataclass(frozen=True)
class Catalogue:
    """Documents of a catalogue's "train" split, without those that are also in its held-out split.

    The held-out documents are its validation split, or its test split if it has no other; if it has neither, a share
    of the train split, by the digests of the documents as in our own corpora.
    """

    config: DataConfig
    builder: tfds.core.DatasetBuilder
    feature: str

    @property
    def name(self) -> str:
        files = [(Path(path).name, *rest) for path, *rest in stats(sorted(Path(self.builder.data_path).glob("*")))]
        key = fingerprint(self.builder.info.full_name, files, self.feature, self.config.valid_fraction)
        return f"tfds-{self.builder.name}-{key}"

    @property
    def directory(self) -> Path:
        """Holds the digests of the held-out documents, where the catalogue has a split of them."""
        return data_folder(self.config.data_dir) / "corpora" / self.name

    def prepare(self, *, workers: int = 0, beam: tfds.download.DownloadConfig | None = None) -> None:
        with resumed(self.directory) as partial:
            if partial is None:
                return
            (partial / "result").mkdir(exist_ok=True)
            digests = []
            if self._held_out != TRAIN:
                digests = sorted({digest(text) for text in self._texts(self._held_out, 0, None)})
            (partial / "result" / "held_out.digests").write_bytes(b"".join(digests))

    def size(self, split: str) -> tuple[int, int]:
        info = self.builder.info.splits[TRAIN if split == TRAIN else self._held_out]
        return info.num_examples, info.num_bytes

    def documents(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        for text in self._texts(TRAIN if split == TRAIN else self._held_out, start, stop):
            if text.strip() and self._belongs(digest(text), split):
                yield Document(text, self.builder.name)

    def reader(self) -> "Catalogue":
        return self

    def report(self) -> Mapping[str, object]:
        return {"duplicates": None, "bad_records": None, "bad": []}

    @property
    def _held_out(self) -> str:
        return next((split for split in HELD_OUT if split in self.builder.info.splits), TRAIN)

    def _belongs(self, key: bytes, split: str) -> bool:
        if self._held_out == TRAIN:
            return is_held_out(key, self.config.valid_fraction) == (split != TRAIN)
        return split != TRAIN or key not in self._held_out_digests

    @cached_property
    def _held_out_digests(self) -> frozenset[bytes]:
        data = (self.directory / "held_out.digests").read_bytes()
        return frozenset(data[start : start + 16] for start in range(0, len(data), 16))

    def _texts(self, split: str, start: int, stop: int | None) -> Iterator[str]:
        with quiet():
            try:
                source: Any = self.builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
            except (NotImplementedError, ValueError) as error:
                raise InputError(
                    f"{PREFIX}{self.builder.info.full_name} in {self.builder.data_dir} cannot be read at random "
                    f"({_first_line(error)}); prepare it anew with file_format='array_record'"
                ) from error
        for index in range(start, len(source) if stop is None else stop):
            text = source[index][self.feature]
            try:
                yield text if isinstance(text, str) else text.decode()
            except UnicodeDecodeError as error:
                raise InputError(f"example {index} of {self.config.corpus}, split {split}: {error}") from error


def open_catalogue(config: DataConfig, beam: tfds.download.DownloadConfig | None = None) -> Catalogue:
    """Returns the corpus that `config` names, prepared by TFDS under `data.source` (or data_dir/tfds) if it is not.

    `beam` says how Apache Beam is to do that, for the corpora of the catalogue that need it.
    Raises InputError if the catalogue has no such corpus, it has no text, or it cannot be prepared here.
    """
    name = config.corpus.removeprefix(PREFIX)
    folder = Path(config.source or data_folder(config.data_dir) / "tfds").expanduser()
    with quiet():
        builder = _builder(name, folder)
        if not builder.info.splits:
            folder.mkdir(parents=True, exist_ok=True)
            with only_one(folder / ".locks" / name.replace("/", "-")):
                builder = _builder(name, folder)
                if not builder.info.splits:
                    _prepare(builder, config, folder, beam or tfds.download.DownloadConfig())
    if TRAIN not in builder.info.splits:
        raise InputError(f"{config.corpus} has no split {TRAIN!r}, but only {', '.join(builder.info.splits)}")
    return Catalogue(config, builder, _text_feature(builder, config))


def _builder(name: str, folder: Path) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, data_dir=folder, try_gcs=False)
    except (DatasetNotFoundError, ImportError, ValueError) as error:
        raise InputError(
            f"the TFDS catalogue has no {name!r} that can be used here ({_first_line(error)}); prepared under "
            f"{folder} it needs no code of the catalogue's: expected {folder}/{name or 'NAME'}/VERSION"
        ) from error


def _prepare(
    builder: tfds.core.DatasetBuilder, config: DataConfig, folder: Path, how: tfds.download.DownloadConfig
) -> None:
    how = how.replace(try_download_gcs=False)
    try:
        builder.download_and_prepare(file_format="array_record", download_config=how)
    except Exception as error:  # the catalogue's code may raise anything
        raise InputError(
            f"{config.corpus} could not be prepared by TFDS ({_first_line(error)}); prepare it where there is a "
            f"network, with file_format='array_record', and copy it to {folder}"
        ) from error


def _text_feature(builder: tfds.core.DatasetBuilder, config: DataConfig) -> str:
    features = cast(tfds.features.FeaturesDict, builder.info.features)
    texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
    wanted = config.text_feature
    if wanted in texts:
        return wanted
    if wanted == "text" and len(texts) == 1:
        return texts[0]
    hint = nearest(wanted, texts) if texts else "it has none of text"
    raise InputError(f"{config.corpus} has no text feature {wanted!r}: data.text_feature, {hint}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

"""A corpus of the TFDS catalogue, prepared here by a small builder of the catalogue's kind."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from small_corpus import documents, flat, make_config, read

from odelm.config import Config, replace
from odelm.data import prepare as prepare_module
from odelm.data.corpus import find_corpus
from odelm.data.prepare import prepare
from odelm.data.sources.documents import digest, is_held_out
from odelm.errors import InputError

TEXTS = documents(60)


class OdelmNovels(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Splits of texts, as the tests give them."""

    VERSION = tfds.core.Version("1.0.0")
    name = "odelm_novels"
    url_infos = {}

    def __init__(self, *, splits: dict[str, list[str]], features: dict, **options):
        self._splits, self._features = splits, features
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self._features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(texts) for name, texts in self._splits.items()}

    def _generate_examples(self, texts):
        for number, text in enumerate(texts):
            yield (
                number,
                {
                    name: text if isinstance(kind, tfds.features.Text) else number
                    for name, kind in self._features.items()
                },
            )


def catalogue(
    tmp_path: Path, splits: dict[str, list[str]], *features: str, file_format: str = "array_record"
) -> Config:
    """Returns a config over a folder of TFDS with the splits; features with a name in small letters are text."""
    kinds = {name: tfds.features.Text() if name.islower() else tfds.features.Scalar(np.int64) for name in features}
    builder = OdelmNovels(data_dir=tmp_path / "tfds", splits=splits, features=kinds)
    builder.download_and_prepare(file_format=file_format)
    config = make_config(tmp_path / "tfds", tmp_path / "cache")
    config = replace(config, {"data.corpus": "tfds:odelm_novels"})
    return config


def texts(config: Config) -> dict[str, list[str]]:
    return {split: sorted(document.text for document in found) for split, found in read(config).items()}


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_its_own_held_out_split_is_used_and_vanishes_from_train(tmp_path: Path, held_out: str):
    config = catalogue(tmp_path, {"train": TEXTS, held_out: [*TEXTS[:3], "only held out"]}, "text")
    assert texts(config) == {"train": sorted(TEXTS[3:]), "validation": sorted([*TEXTS[:3], "only held out"])}
    prepared = prepare(config)
    assert prepared.train.keys() == {"odelm_novels"}
    found = prepared.tokenizer.decode(flat(prepared.train).tolist(), skip_special_tokens=False)
    assert sorted(found.split("<|endoftext|>")[:-1]) == sorted(TEXTS[3:])


def test_validation_comes_before_test(tmp_path: Path):
    config = catalogue(tmp_path, {"train": TEXTS, "validation": ["a b"], "test": [TEXTS[0]]}, "text")
    assert texts(config) == {"train": sorted(TEXTS), "validation": ["a b"]}


@pytest.mark.parametrize("unit_bytes", [100, 1 << 20])
def test_with_train_alone_a_share_is_held_out_by_the_hash(tmp_path: Path, monkeypatch, unit_bytes: int):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", unit_bytes)
    config = catalogue(tmp_path, {"train": [*TEXTS, " \n"]}, "text")
    held_out = [text for text in TEXTS if is_held_out(digest(text), config.data.valid_fraction)]
    expected = {"train": sorted(set(TEXTS) - set(held_out)), "validation": sorted(held_out)}
    assert texts(config) == expected and held_out
    prepared = prepare(config)
    for split, stored in (("train", prepared.train), ("validation", prepared.validation)):
        found = prepared.tokenizer.decode(flat(stored).tolist(), skip_special_tokens=False)
        assert sorted(found.split("<|endoftext|>")[:-1]) == expected[split]


def test_another_feature_by_its_name_or_alone(tmp_path: Path):
    config = catalogue(tmp_path, {"train": TEXTS}, "story", "NUMBER")
    assert sum(map(len, texts(config).values())) == 60
    config = replace(config, {"data.text_feature": "story"})
    assert sum(map(len, texts(config).values())) == 60
    config = replace(config, {"data.text_feature": "stories"})
    with pytest.raises(InputError, match="no text feature 'stories': data.text_feature, did you mean 'story'"):
        prepare(config)


def test_of_two_features_of_text_one_must_be_named(tmp_path: Path):
    config = catalogue(tmp_path, {"train": TEXTS}, "story", "title")
    with pytest.raises(InputError, match="no text feature 'text': data.text_feature, .*story, title"):
        prepare(config)


def test_without_text_it_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match="no text feature 'text': data.text_feature, it has none"):
        prepare(catalogue(tmp_path, {"train": TEXTS}, "NUMBER"))


def test_without_train_it_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match="odelm_novels has no split 'train', but only test"):
        prepare(catalogue(tmp_path, {"test": TEXTS}, "text"))


def test_what_is_not_in_the_catalogue_is_named(tmp_path: Path):
    config = make_config(tmp_path / "tfds", tmp_path / "cache")
    config = replace(config, {"data.corpus": "tfds:no_such_corpus"})
    with pytest.raises(InputError, match="no 'no_such_corpus' that can be used here") as caught:
        prepare(config)
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()


@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="a tfrecord is written by TensorFlow")
def test_a_tfrecord_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match="file_format='array_record'"):
        prepare(catalogue(tmp_path, {"train": TEXTS}, "text", file_format="tfrecord"))


def test_the_second_call_is_the_first(tmp_path: Path, capsys):
    config = catalogue(tmp_path, {"train": TEXTS}, "text")
    first = prepare(config)
    capsys.readouterr()
    assert prepare(config).directory == first.directory and capsys.readouterr() == ("", "")


def test_other_text_under_the_same_name_is_another_corpus(tmp_path: Path):
    first = prepare(catalogue(tmp_path / "a", {"train": TEXTS}, "text"))
    config = catalogue(tmp_path / "b", {"train": [text.replace("the", "a") for text in TEXTS]}, "text")
    config = replace(config, {"data.data_dir": str(tmp_path / "a" / "cache")})
    assert prepare(config, tokenizer_file=first.directory / "tokenizer.json").digest != first.digest


def test_a_corpus_of_the_real_catalogue_that_cannot_be_fetched(tmp_path: Path, monkeypatch):
    def offline(builder, **options):
        assert builder.name == "lm1b" and options["file_format"] == "array_record"
        raise OSError("no network\nno hope")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    config = make_config(tmp_path / "tfds", tmp_path / "cache")
    config = replace(config, {"data.corpus": "tfds:lm1b"})
    expected = f"tfds:lm1b could not be prepared by TFDS .OSError: no network.; .* copy it to {tmp_path / 'tfds'}$"
    with pytest.raises(InputError, match=expected):
        prepare(config)


def test_the_examples_that_tfds_mocks(tmp_path: Path):
    """TFDS's own stand-in for a corpus that is not there in full: texts of its own making, of the features' kinds."""
    corpus = find_corpus(catalogue(tmp_path, {"train": TEXTS, "validation": TEXTS[:20]}, "text", "title").data)
    with tfds.testing.mock_data(num_examples=60):
        corpus.prepare()
        train, held_out = ({document.text for document in corpus.documents(split)} for split in ("train", "validation"))
    assert train.isdisjoint(TEXTS) and len(train | held_out) > 40
    assert train.isdisjoint(held_out) and held_out

"""The Pile by its sets: which one a document is from is kept, some may be chosen, and what is excluded is nowhere."""

from pathlib import Path

import numpy as np
import pytest
import zstandard
from array_record.python.array_record_data_source import ArrayRecordDataSource
from small_corpus import documents, make_config, pile_lines, read, texts_of, write_jsonl

from odelm.config import Config, replace
from odelm.data.corpus import find_corpus
from odelm.data.prepare import prepare
from odelm.errors import InputError

SAMPLE = Path(__file__).parents[3].parent / "shared" / "data" / "pile_sample"
SETS = {"Pile-CC": documents(60)[:30], "Github": documents(60)[30:], "Books3": []}
SECRET = "an excluded sentence that is nowhere"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two shards with two sets each, the third set being the one that tests exclude."""
    (tmp_path / "in").mkdir()
    books = [f"{SECRET} {number}" for number in range(40)]
    for number in range(2):
        sets = {name: texts[number::2] for name, texts in SETS.items()} | {"Books3": books[number::2]}
        data = zstandard.ZstdCompressor().compress(pile_lines(sets).encode())
        (tmp_path / "in" / f"{number:02d}.jsonl.zst").write_bytes(data)
    config = make_config(tmp_path / "in", tmp_path / "cache")
    config = replace(config, {"data.corpus": "pile"})
    return config


def test_the_name_of_the_set_is_a_feature_and_a_component(config: Config):
    splits = read(config)
    for name in ("Pile-CC", "Github"):
        found = sorted(item.text for split in splits.values() for item in split if item.component == name)
        assert found == sorted(SETS[name])
    assert "pile_set_name" in find_corpus(config.data)._opened().info.features  # pyright: ignore
    assert list(prepare(config).train) == ["Books3", "Github", "Pile-CC"]


def test_components_are_chosen(config: Config):
    config = replace(config, {"data.components": ("Github", "Pile-CC")})
    assert texts_of(config) == sorted(SETS["Pile-CC"] + SETS["Github"])
    prepared = prepare(config)
    assert list(prepared.train) == list(prepared.validation) == ["Github", "Pile-CC"]
    split = read(config)["train"]
    for name, stream in prepared.train.items():
        ends = np.flatnonzero(stream.tokens[:] == 1) + 1
        texts = [prepared.tokenizer.decode(ids.tolist()) for ids in np.split(stream.tokens[:], ends)[:-1]]
        assert texts == [item.text for item in split if item.component == name]


def test_nothing_of_an_excluded_set_is_on_disk(config: Config, tmp_path: Path, monkeypatch):
    config = replace(config, {"data.exclude": ("Books3",)})
    monkeypatch.setattr("odelm.files.shutil.rmtree", lambda *arguments, **options: None)
    assert texts_of(config) == sorted(SETS["Pile-CC"] + SETS["Github"])
    prepared = prepare(config)
    assert list(prepared.train) == ["Github", "Pile-CC"]
    assert "sentence" not in prepared.tokenizer.decode(list(range(prepared.tokenizer.get_vocab_size())))
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert any("parts" in file.parts for file in files), "the parts too are looked at"
    for file in files:
        assert all(SECRET.encode() not in text for text in contents(file)), file


def contents(file: Path) -> list[bytes]:
    """Returns what stands in a file, record by record if they are compressed."""
    if ".array_record" not in file.name:
        return [file.read_bytes()]
    with ArrayRecordDataSource([str(file)]) as source:
        return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("option", ["components", "exclude"])
def test_an_unknown_set_names_the_nearest_and_leaves_nothing(config: Config, tmp_path: Path, option: str):
    config = replace(config, {f"data.{option}": ("Git-hub",)})
    expected = f"data.{option} names 'Git-hub', .*did you mean 'Github'.*Books3, Github, Pile-CC"
    with pytest.raises(InputError, match=expected):
        prepare(config)
    assert [path.name for path in (tmp_path / "cache" / "corpora").iterdir()] == [".locks"]


def test_a_text_corpus_has_its_files_and_folders_for_components(tmp_path: Path):
    folder = tmp_path / "in"
    (folder / "poems").mkdir(parents=True)
    write_jsonl(folder / "wiki.jsonl", documents(30))
    for number, text in enumerate(documents(60)[30:]):
        (folder / "poems" / f"{number}.txt").write_text(text)
    config = make_config(folder, tmp_path / "cache")
    assert list(prepare(config).train) == ["poems", "wiki"]
    config = replace(config, {"data.exclude": ("wiki",)})
    assert texts_of(config) == sorted(documents(60)[30:])


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no real sample in {SAMPLE}")
def test_the_real_sample_plain_and_compressed(tmp_path: Path):
    digests = set()
    for name in ("pile_text.jsonl", "pile_text.jsonl.zst"):
        config = make_config(SAMPLE / name, tmp_path / "cache")
        config = replace(config, {"data.corpus": "pile"})
        digests.add(prepare(config).digest)
        documents = [item for split in read(config).values() for item in split]
        assert len(documents) == 10 and all(item.component and item.component[0].isupper() for item in documents)
    assert len(digests) == 1

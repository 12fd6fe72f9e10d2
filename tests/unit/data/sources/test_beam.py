"""A corpus read by Apache Beam's local runner is the one that is read here."""

from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from small_corpus import documents, make_config, write_jsonl

from odelm.config import Config, replace
from odelm.data.prepare import prepare
from odelm.data.sources import document_shards
from odelm.data.tokens import Prepared, index
from odelm.errors import InputError

beam = pytest.importorskip("apache_beam", reason="needs Apache Beam: make test-beam")

RUNNER = tfds.download.DownloadConfig(beam_runner="DirectRunner")


def files_of(prepared: Prepared) -> dict[str, bytes]:
    folder = prepared.directory
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.array_record")}


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A corpus of three parts with copies within and across them, one component left out."""
    monkeypatch.setattr(document_shards, "SHARD_BYTES", 1)
    texts, folder = documents(60), tmp_path / "docs"
    folder.mkdir()
    for number in range(3):
        write_jsonl(folder / f"part{number}.jsonl", texts[number * 20 : number * 20 + 20] + texts[15:30])
    write_jsonl(folder / "left.jsonl", ["left out: " + text for text in texts])
    config = make_config(folder, tmp_path / "here")
    config = replace(config, {"data.exclude": ("left",)})
    return config


def test_beam_prepares_the_same_bytes(several: Config, tmp_path: Path):
    here = prepare(several)
    several = replace(several, {"data.data_dir": str(tmp_path / "beam")})
    there = prepare(several, beam=RUNNER)
    assert files_of(there) == files_of(here) and there.digest == here.digest
    counts = [
        sum(index(made.directory)["splits"][split]["documents"] for split in index(made.directory)["splits"])
        for made in (here, there)
    ]
    assert counts == [60, 60]


def test_a_bad_record_is_named_by_beam_too(several: Config):
    path = Path(several.data.source) / "part1.jsonl"
    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(InputError, match="part1.jsonl, line 36 is not JSON"):
        prepare(several, beam=RUNNER)
    assert not [path for path in Path(several.data.data_dir, "corpora").iterdir() if not path.name.startswith(".")]
    several = replace(several, {"data.on_bad_record": "skip"})
    assert prepare(several, beam=RUNNER).train_tokens


def test_an_empty_split_is_named_by_beam_too(several: Config):
    several = replace(several, {"data.valid_fraction": 1e-9})
    with pytest.raises(InputError, match="validation"):
        prepare(several, beam=RUNNER)


@pytest.mark.parametrize(("option", "names"), [("exclude", ("lift",)), ("components", ("part0", "part9"))])
def test_a_mistyped_component_is_named_by_beam_too(several: Config, option: str, names: tuple[str, ...]):
    several = replace(several, {"data.exclude": ()})
    several = replace(several, {f"data.{option}": names})
    with pytest.raises(InputError, match=f"data.{option} names '{names[-1]}', .*did you mean"):
        prepare(several, beam=RUNNER)

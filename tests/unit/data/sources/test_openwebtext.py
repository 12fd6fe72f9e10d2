"""All forms of OpenWebText give the same documents: how it was stored is not what it says."""

import io
import lzma
import tarfile
from pathlib import Path

import pytest
from small_corpus import documents, inner_archives, make_config, read, tar_of, texts_of, write_jsonl

from odelm.config import Config, replace
from odelm.data.prepare import prepare
from odelm.data.sources import document_shards

SAMPLE = Path(__file__).parents[3].parent / "shared" / "data" / "openwebtext_sample"
FORMS = ("tar", "tar.xz", "folder", "jsonl")


def stored(folder: Path, form: str, texts: list[str]) -> Path:
    """Writes the texts in one of the forms into a folder of its own, and returns that."""
    folder = folder / form
    (folder / "openwebtext").mkdir(parents=True)
    archives = inner_archives(texts, 3)
    if form == "jsonl":
        write_jsonl(folder / "part.jsonl", texts)
    elif form == "folder":
        for name, data in archives.items():
            (folder / name).write_bytes(data)
    else:
        data = tar_of(archives)
        (folder / f"openwebtext.{form}").write_bytes(lzma.compress(data) if form == "tar.xz" else data)
    return folder


def config_of(source: Path, data_dir: Path) -> Config:
    config = make_config(source, data_dir)
    config = replace(config, {"data.corpus": "openwebtext"})
    return config


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_all_forms_give_the_same_documents_and_tokens(tmp_path: Path, monkeypatch, part_bytes: int):
    monkeypatch.setattr(document_shards, "SHARD_BYTES", part_bytes)
    texts = [*documents(40), "naïve ✓\n", " \n", *documents(3)]
    configs = [config_of(stored(tmp_path, form, texts), tmp_path / "cache") for form in FORMS]
    assert texts_of(configs[0]) == sorted([*documents(40), "naïve ✓\n"])
    first = read(configs[0])
    assert {document.component for document in first["train"]} == {"openwebtext"}
    assert all(read(config) == first for config in configs[1:])
    prepared = [prepare(config) for config in configs]
    assert len({one.digest for one in prepared}) == 1
    assert len({one.directory for one in prepared}) == len(FORMS)


def test_an_archive_may_stand_beside_an_unpacked_one(tmp_path: Path):
    """Someone who unpacked the archive and kept it has everything twice, and trains on it once."""
    stored(tmp_path, "tar", documents(40))
    stored(tmp_path, "folder", documents(40))
    assert texts_of(config_of(tmp_path, tmp_path / "cache")) == sorted(documents(40))


def test_what_is_no_text_file_in_an_archive_is_passed_over(tmp_path: Path):
    with tarfile.open(tmp_path / "openwebtext.tar", "w") as tar:
        folder = tarfile.TarInfo("openwebtext")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in inner_archives(documents(40), 2).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert len(texts_of(config_of(tmp_path / "openwebtext.tar", tmp_path / "cache"))) == 40


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no real sample in {SAMPLE}")
def test_the_real_sample_in_its_own_layout_and_as_lines(tmp_path: Path):
    names = ("openwebtext-1000.repacked.tar", "openwebtext-1000.jsonl.xz")
    packed, lines = (read(config_of(SAMPLE / name, tmp_path / "cache")) for name in names)
    assert packed == lines and sum(map(len, packed.values())) == 1000

"""What is wrong with the input is named in one line with its file and place, and nothing half-prepared is left."""

import gzip
import io
import json
import lzma
import os
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from small_corpus import documents, inner_archives, make_config, pile_lines, tar_of, texts_of, write_jsonl

from odelm.config import Config, replace
from odelm.data import prepare as prepare_module
from odelm.data import tokens
from odelm.data.corpus import find_corpus
from odelm.data.prepare import prepare
from odelm.data.sources import document_shards, files
from odelm.data.tokens import index
from odelm.errors import InputError

COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def pages(texts: list[str]) -> dict[str, bytes]:
    """Returns archives of an OpenWebText's folder by the names they have there."""
    return {Path(name).name: data for name, data in inner_archives(texts, 2).items()}


def without_end(data: bytes, keep: float = 0.5) -> bytes:
    return data[: int(len(data) * keep)]


def cut_tar(data: bytes, into: int) -> bytes:
    """Returns a tar cut off `into` bytes after its last member begins."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data[: tar.getmembers()[-1].offset + into]


def spoilt_header(data: bytes) -> bytes:
    """Returns a tar with the name of its last member changed, so that its checksum is wrong."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        place = tar.getmembers()[-1].offset
    return data[:place] + b"?" + data[place + 1 :]


def whole_tar() -> bytes:
    return tar_of(inner_archives(documents(40), 2))


def table_of(texts: list[bytes]) -> bytes:
    """Returns a Parquet file whose column `text` holds these bytes, UTF-8 or not."""
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), pyarrow.array(texts).buffers())
    data = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": column}), data)
    return data.getvalue()


def spoilt_page(data: bytes) -> bytes:
    """Returns a Parquet file with some bytes of its first page changed."""
    return data[:40] + bytes(60) + data[100:]


def inner_of(texts: list[str], change: Callable[[bytes], bytes]) -> bytes:
    """Returns an outer tar whose first archive is changed."""
    (first, data), *rest = inner_archives(texts, 2).items()
    return tar_of({first: change(data), **dict(rest)})


BAD = {
    # corpus, file, its bytes, what the message says of the place
    "outer tar cut in a member": ("openwebtext", "owt.tar", cut_tar(whole_tar(), 600), "to its end"),
    "outer tar cut in a header": ("openwebtext", "owt.tar", cut_tar(whole_tar(), 300), "to its end"),
    "outer tar cut between members": ("openwebtext", "owt.tar", cut_tar(whole_tar(), 0), "to its end"),
    "outer tar with nothing in it": ("openwebtext", "owt.tar", tar_of({}), "it holds no file"),
    "outer tar with a spoilt header": ("openwebtext", "owt.tar", spoilt_header(whole_tar()), "to its end"),
    "compressed outer tar truncated": (
        "openwebtext",
        "o.tar.xz",
        without_end(lzma.compress(whole_tar())),
        "to its end",
    ),
    "no tar": ("openwebtext", "owt.tar", b"no archive" * 200, "to its end"),
    "empty tar": ("openwebtext", "owt.tar", b"", "to its end"),
    "inner archive truncated": (
        "openwebtext",
        "owt.tar",
        inner_of(documents(40), without_end),
        "member openwebtext/urlsf_subset00-0_data.xz cannot be read to its end",
    ),
    "inner archive in a folder truncated": (
        "openwebtext",
        "urlsf_subset00-1_data.xz",
        without_end(list(pages(documents(40)).values())[0]),
        "to its end",
    ),
    "inner tar without its end": (
        "openwebtext",
        "urlsf_subset00-1_data.xz",
        lzma.compress(cut_tar(tar_of({"a.txt": b"one", "b.txt": b"two"}), 0)),
        "to its end",
    ),
    "page that is not UTF-8": (
        "openwebtext",
        "owt.tar",
        tar_of({"x_data.xz": lzma.compress(tar_of({"0001.txt": b"one\n\xff"}))}),
        "member x_data.xz, file 0001.txt, line 2: byte 0xff is not UTF-8",
    ),
    **{
        f"{suffix} truncated": ("text", f"a.jsonl{suffix}", without_end(compress(lines(documents(400)))), "to its end")
        for suffix, compress in COMPRESS.items()
    },
    "not JSON": ("text", "a.jsonl", lines(documents(3)) + b"nothing\n", "line 4 is not JSON"),
    "no text": ("text", "a.jsonl", lines(documents(3)) + b'{"body": "x"}\n', 'line 4 has no string "text"'),
    "not UTF-8": ("text", "a.jsonl", lines(documents(3)) + b'{"text": "\xff"}\n', "line 4: byte 0xff is not UTF-8"),
    "text not UTF-8": ("text", "a.txt", b"one\ntwo \xff\n", "line 2: byte 0xff is not UTF-8"),
    "field that is no text": ("text", "a.jsonl", b'{"text": [1]}\n', 'line 1 has no string "text": it is list'),
    "page of Parquet": (
        "text",
        "a.parquet",
        spoilt_page(table_of([text.encode() for text in documents(40)])),
        "a.parquet cannot be read to its end",
    ),
    "row not UTF-8": ("text", "a.parquet", table_of([b"one", b"\xff two"]), "row 2: 'text' is not UTF-8"),
    "no set": (
        "pile",
        "00.jsonl",
        (pile_lines({"Books3": documents(3)}) + '{"text": "x", "meta": {}}\n').encode(),
        'line 4 has no "meta": {"pile_set_name": "..."}',
    ),
}


def assert_nothing_kept(data_dir: Path) -> None:
    assert not [path for path in data_dir.glob("*/*") if path.name != ".locks"]
    assert not any((data_dir / kind).exists() for kind in ("tokens", "tokenizers"))


@pytest.fixture
def config_with(tmp_path: Path) -> Callable[[str], Config]:
    def made(case: str) -> Config:
        corpus, name, data, _ = BAD[case]
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / name).write_bytes(data)
        config = make_config(tmp_path / "in", tmp_path / "cache")
        config = replace(config, {"data.corpus": corpus})
        return config

    return made


@pytest.mark.parametrize("case", BAD)
def test_it_is_named_with_its_place_and_leaves_nothing(config_with, tmp_path: Path, case: str):
    config = config_with(case)
    with pytest.raises(InputError) as caught:
        prepare(config)
    message = str(caught.value)
    assert f"{tmp_path / 'in' / BAD[case][1]}" in message and BAD[case][3] in message and "\n" not in message
    assert_nothing_kept(tmp_path / "cache")


def test_a_data_dir_that_is_not_utf8_is_refused(tmp_path: Path):
    config = make_config(write_jsonl(tmp_path / "docs.jsonl", documents(10)), Path(f"{tmp_path}/\udcff"))
    with pytest.raises(InputError, match="data.data_dir .* is not UTF-8"):
        prepare(config)


@pytest.mark.parametrize("case", ["not JSON", "inner archive truncated", ".zst truncated"])
def test_the_right_input_goes_through_where_the_wrong_did_not(config_with, tmp_path: Path, case: str):
    config = config_with(case)
    with pytest.raises(InputError):
        prepare(config)
    (tmp_path / "in" / BAD[case][1]).unlink()
    if config.data.corpus == "openwebtext":
        (tmp_path / "in" / "owt.tar").write_bytes(whole_tar())
    else:
        write_jsonl(tmp_path / "in" / "a.jsonl", documents(40))
    prepare(config)
    assert len(texts_of(config)) == 40


@pytest.mark.parametrize(
    ("texts", "fraction", "expected"),
    [
        (["", "  "], 0.2, "the corpus is empty"),
        (documents(3), 1e-6, "no document fell into the validation split .* raise data.valid_fraction"),
        (documents(3), 0.999999, "no document fell into the train split .* lower data.valid_fraction"),
    ],
)
def test_an_empty_split_is_an_error_and_leaves_nothing(
    tmp_path: Path, texts: list[str], fraction: float, expected: str
):
    config = make_config(write_jsonl(tmp_path / "docs.jsonl", texts), tmp_path / "cache")
    config = replace(config, {"data.valid_fraction": fraction})
    with pytest.raises(InputError, match=expected):
        prepare(config)
    assert_nothing_kept(tmp_path / "cache")


def skipping(config: Config) -> Config:
    config = replace(config, {"data.on_bad_record": "skip", "data.valid_fraction": 0.3})
    return config


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_bad_records_are_left_out_counted_and_told(tmp_path: Path, capsys, monkeypatch, part_bytes: int):
    monkeypatch.setattr(document_shards, "SHARD_BYTES", part_bytes)
    (tmp_path / "in").mkdir()
    good = documents(40)
    (tmp_path / "in" / "a.jsonl").write_bytes(lines(good[:20]) + b"nothing\n" + lines(good[20:]))
    (tmp_path / "in" / "b.jsonl").write_bytes(b'{"body": "x"}\n' + lines(good[:2]))
    (tmp_path / "in" / "c.txt").write_bytes(b"\xff")
    config = skipping(make_config(tmp_path / "in", tmp_path / "cache"))
    left_out = index(prepare(config).directory)["left_out"]
    assert texts_of(config) == sorted(good)
    assert (left_out["duplicates"], left_out["bad_records"]) == (2, 3)
    for message, place in zip(left_out["bad"], ("a.jsonl, line 21", "b.jsonl, line 1", "c.txt, line 1"), strict=True):
        assert f"{tmp_path / 'in'}/{place}" in message
    assert "2 copies left out; 3 records that cannot be read left out" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_damaged_file_gives_its_documents_up_to_the_damage(tmp_path: Path, suffix: str):
    (tmp_path / "in").mkdir()
    texts = documents(4000)
    path = tmp_path / "in" / f"a.jsonl{suffix}"
    path.write_bytes(without_end(COMPRESS[suffix](lines(texts)), 0.7))
    write_jsonl(tmp_path / "in" / "b.jsonl", ["another file"])
    config = skipping(make_config(tmp_path / "in", tmp_path / "cache"))
    found = set(texts_of(config)) - {"another file"}
    assert 1000 < len(found) < 4000 and found == set(texts[: len(found)])
    left_out = find_corpus(config.data).report()
    assert left_out["bad_records"] == 1 and f"{path} cannot be read to its end" in left_out["bad"][0]


@pytest.mark.parametrize("form", [".tar", ".tar.xz", "folder"])
def test_other_archives_are_read_where_one_is_damaged(tmp_path: Path, form: str):
    (tmp_path / "in").mkdir()
    data = inner_of(documents(40), lambda data: without_end(data, 0.8))
    if form == "folder":
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(tmp_path / "in", filter="data")
    else:
        path = tmp_path / "in" / f"owt{form}"
        path.write_bytes(lzma.compress(data) if form == ".tar.xz" else data)
    config = skipping(make_config(tmp_path / "in", tmp_path / "cache"))
    config = replace(config, {"data.corpus": "openwebtext"})
    found = texts_of(config)
    assert set(documents(40)[20:]) <= set(found) <= set(documents(40))
    left_out = find_corpus(config.data).report()
    assert left_out["bad_records"] == 1 and "urlsf_subset00-0_data.xz" in left_out["bad"][0]


@pytest.mark.parametrize(("into", "bad"), [(0, 1), (300, 1), (700, 2)])
def test_an_outer_tar_that_ends_early_gives_its_archives_up_to_there(tmp_path: Path, into: int, bad: int):
    """Cut in a member, both the tar and that member are named."""
    (tmp_path / "in").mkdir()
    data = tar_of(inner_archives(documents(80), 4))
    (tmp_path / "in" / "owt.tar").write_bytes(cut_tar(data, into))
    config = skipping(make_config(tmp_path / "in", tmp_path / "cache"))
    config = replace(config, {"data.corpus": "openwebtext"})
    assert set(documents(60)) <= set(texts_of(config)) < set(documents(80))
    report = find_corpus(config.data).report()
    assert report["bad_records"] == bad and f"{tmp_path / 'in' / 'owt.tar'} cannot be read to" in report["bad"][0]


# What is kept beside the tokens, damaged after it was whole.
SHARD = "train/00000"
DAMAGE = {
    "index empty": lambda folder: (folder / "prepared.json").write_text(""),
    "index without entries": lambda folder: (folder / "prepared.json").write_text("{}"),
    "index null": lambda folder: (folder / "prepared.json").write_text("null"),
    "index missing": lambda folder: (folder / "prepared.json").unlink(),
    "shard empty": lambda folder: (folder / f"{SHARD}.array_record").write_bytes(b""),
    "shard truncated": lambda folder: cut(folder / f"{SHARD}.array_record"),
    "shard missing": lambda folder: (folder / f"{SHARD}.array_record").unlink(),
    "lengths truncated": lambda folder: cut(folder / f"{SHARD}.lengths"),
    "lengths missing": lambda folder: (folder / f"{SHARD}.lengths").unlink(),
    "tokenizer missing": lambda folder: (folder / "tokenizer.json").unlink(),
}


def cut(path: Path) -> None:
    path.write_bytes(without_end(path.read_bytes(), 0.5))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tokens_are_named(config: Config, damage: str):
    folder = prepare(config).directory
    DAMAGE[damage](folder)
    with pytest.raises(InputError, match=f"{folder}") as caught:
        prepare(config)
    message = str(caught.value)
    assert "\n" not in message and ("remove" in message or "tokenizer.json is not a file" in message)
    if damage.startswith(("shard", "lengths")):
        assert SHARD in message
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    folder.rmdir()
    assert prepare(config).train_tokens == 3330, "removed, it is made again"


def test_a_changed_tokenizer_beside_the_tokens_is_named_with_both_digests(config: Config):
    path = prepare(config).directory / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|mask|>"', '"<|mosk|>"'))
    with pytest.raises(
        InputError, match=f"{path} has SHA-256 [0-9a-f]{{12}}, but the tokens in .* with [0-9a-f]{{12}}"
    ):
        prepare(config)


def test_a_vocabulary_larger_than_the_models_is_named(config: Config):
    path = prepare(config).directory / "tokenizer.json"
    config = replace(config, {"data.tokenizer": str(path), "model.vocab_size": 299})
    with pytest.raises(InputError, match="has 300 tokens, more than model.vocab_size 299"):
        prepare(config)


def test_what_the_system_cannot_read_stops_and_leaves_what_is_finished(tmp_path: Path, monkeypatch):
    """It is no bad record, nor a mistake: the same command may do better, and resumes from the finished shards."""
    monkeypatch.setattr(document_shards, "SHARD_BYTES", 1)
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(3):
        write_jsonl(folder / f"{number}.jsonl", documents(60)[number * 20 : number * 20 + 20])
    config = make_config(folder, tmp_path / "cache")
    config = replace(config, {"data.on_bad_record": "skip"})
    opened = files._decompressed

    def failing(path: Path):
        if path.name == "2.jsonl":
            raise OSError(5, "Input/output error")
        return opened(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_decompressed", failing)
        with pytest.raises(InputError, match="2.jsonl could not be read .*same command"):
            prepare(config)
    assert len(list(tmp_path.glob("cache/corpora/*.partial/parts/*.json"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(
            files, "_decompressed", lambda path: opened(path) if path.name == "2.jsonl" else pytest.fail(path)
        )
        assert sum(len(stream.lengths) for stream in prepare(config).train.values())


def test_a_broken_link_is_named(tmp_path: Path):
    folder = tmp_path / "docs"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", documents(5))
    (folder / "b.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="b.jsonl cannot be read .*remove the link"):
        prepare(make_config(folder, tmp_path / "cache"))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", documents(5))

    def unlisted(root, onerror, **_):
        onerror(PermissionError(13, "Permission denied", f"{root}/below"))
        return iter(())

    monkeypatch.setattr(files.os, "walk", unlisted)
    with pytest.raises(InputError, match="folder .*below cannot be listed"):
        files.text_files(str(tmp_path))


def test_a_name_that_is_no_utf8_is_read(tmp_path: Path):
    folder = tmp_path / "docs"
    folder.mkdir()
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl"))
    write_jsonl(odd, documents(40))
    assert list(prepare(make_config(folder, tmp_path / "cache")).train) == ["caf\ufffd"]


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch):
    """The soft limit is raised as far as the hard one allows; beyond it the mistake is told before training."""
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 500)
    config = make_config(write_jsonl(tmp_path / "docs.jsonl", documents(200)), tmp_path / "cache")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(tokens, "OTHER_FILES", used + 40)
    prepared = prepare(config)
    count = len(list(prepared.directory.glob("train/*.array_record")))
    assert count > 50
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
        (stream,) = prepare(config).train.values()
        assert len(stream.tokens[:]) == stream.lengths.sum()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr(tokens.resource, "getrlimit", lambda which: (10, 20))
    with pytest.raises(InputError, match=f"{count} files of tokens .* limit is 20"):
        prepare(config)

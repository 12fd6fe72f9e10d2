"""Every format is read, and everything that can be wrong with a source is said in one line."""

import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from odelm.data.sources.documents import BadRecord, Document, checked, text_documents
from odelm.data.sources.files import ENDINGS, JSONL_ENDINGS, PARQUET_ENDINGS, text_files
from odelm.errors import InputError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
TEXTS = ["def f():\n    return 'é'\n", "second ✓", "x " * 100_000]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](data))
    return path


def texts_of(path: Path) -> list[str]:
    return [document.text for document in checked(text_documents(path))]


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        texts_of(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_is_read(tmp_path: Path, ending: str):
    if ending in PARQUET_ENDINGS:
        path, expected = tmp_path / "a.parquet", TEXTS
        parquet.write_table(pyarrow.table({"text": TEXTS, "other": range(len(TEXTS))}), path)
    elif ending in JSONL_ENDINGS:
        lines = [json.dumps({"text": text}) for text in TEXTS]
        path, expected = write(tmp_path / f"a{ending}", "\n\n".join(lines).encode()), TEXTS
    else:
        path, expected = write(tmp_path / f"a{ending}", TEXTS[0].encode()), TEXTS[:1]
    assert texts_of(path) == expected
    capital = path.with_name(path.name.upper())
    path.rename(capital)
    assert texts_of(capital) == expected
    assert text_files(str(tmp_path)) == [capital]


@pytest.mark.parametrize(("name", "count"), [("a.jsonl.txt", 1), ("a.txt.jsonl", 2), ("a.jsonl.v2.txt.gz", 1)])
def test_the_ending_says_the_kind(tmp_path: Path, name: str, count: int):
    assert len(texts_of(write(tmp_path / name, b'{"text": "one"}\n{"text": "two"}\n'))) == count


def test_zst_of_several_frames_and_a_byte_order_mark(tmp_path: Path):
    frames = [zstandard.ZstdCompressor().compress(part) for part in (b"\xef\xbb\xbfone ", b"two " * 50_000, b"three")]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(frames))
    assert texts_of(path) == ["one " + "two " * 50_000 + "three"]


def test_blank_documents_are_left_out(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", b'{"text": ""}\n{"text": "kept"}\n{"text": " \\n"}\n')
    assert texts_of(path) == ["kept"]


def test_source_is_a_file_a_folder_or_a_glob(tmp_path: Path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    files = [tmp_path / "b.txt", tmp_path / "deep" / "a.jsonl.gz", tmp_path / "deep" / "er" / "c.txt.zst"]
    for file in [*files, tmp_path / "README.md"]:
        file.touch()
    assert text_files(str(files[0])) == files[:1]
    assert text_files(str(tmp_path)) == files
    assert text_files(f"{tmp_path}/**/*.txt*") == [files[0], files[2]]


def names(found: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in found]


def test_a_folder_and_a_glob_give_the_same_files(tmp_path: Path, capfd):
    """Hidden ones and what is no regular file are passed over and counted; links are followed, once."""
    root, other = tmp_path / "a", tmp_path / "other"
    for folder in (root / ".git", root / "b" / ".ipynb_checkpoints", other / "deep"):
        folder.mkdir(parents=True)
    for file in (".git/x.txt", "b/.ipynb_checkpoints/y.txt", ".z.txt", "one.txt", "b/two.txt", "README.md"):
        (root / file).write_text("text")
    (other / "deep" / "three.txt").write_text("text")
    os.mkfifo(root / "pipe.txt")
    (root / "linked").symlink_to(other)
    (root / "b" / "again").symlink_to(other)
    (root / "b" / "up").symlink_to(root)
    (root / "c.txt").symlink_to(root / "b" / "two.txt")
    (root / "loop.txt").symlink_to(root / "loop.txt")
    expected = ["b/two.txt", "linked/deep/three.txt", "loop.txt", "one.txt"]
    assert names(text_files(str(root)), root) == expected
    told = capfd.readouterr().err
    assert "3 hidden (.git, .z.txt, .ipynb_checkpoints)" in told
    assert "1 not regular files (pipe.txt)" in told and "1 of other kinds (README.md)" in told
    assert names(text_files(f"{root}/**/*.txt"), root) == expected
    assert "1 not regular files (pipe.txt)" in capfd.readouterr().err


def test_a_pipe_is_no_source(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="is no regular file"):
        text_files(str(tmp_path / "pipe.txt"))


def test_the_field_of_the_text_may_have_another_name(tmp_path: Path):
    lines = write(tmp_path / "a.jsonl", b'{"text": "no", "body": "one"}\n{"body": "two"}\n')
    assert [document.text for document in checked(text_documents(lines, "body"))] == ["one", "two"]
    assert 'has no string "text", but body; expected' in error_of(lines)
    table = tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", "", None, "two"]}), table)
    found = list(text_documents(table, "body"))
    assert [record.text for record in found if isinstance(record, Document)] == ["one", "two"]
    assert [record.message for record in found if isinstance(record, BadRecord)] == [
        f"{table}, row 3: 'body' is NoneType, expected a text"
    ]
    assert "has no column 'text', but body: set data.text_field" in error_of(table)
    table.write_bytes(table.read_bytes()[:-9])
    assert "cannot be read to its end" in error_of(table)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("absent", "does not exist"), ("*.jsonl", "matches no file"), ("a.md", "supported ending"), (".", "supported")],
)
def test_a_source_that_gives_no_file_is_named(tmp_path: Path, monkeypatch, source: str, expected: str):
    (tmp_path / "a.md").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=expected) as caught:
        text_files(source)
    assert repr(source) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"not json", "line 2 is not JSON"),
        (b'{"body": "x"}', 'line 2 has no string "text"'),
        (b'{"text": 3}', 'line 2 has no string "text"'),
        (b'["text"]', 'line 2 has no string "text"'),
        (b'{"text": "caf\xe9"}', "line 2: byte 0xe9 is not UTF-8"),
        (b'{"text": "\\ud800"}', "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, expected: str):
    assert expected in error_of(write(tmp_path / "a.jsonl.gz", b'{"text": "good"}\n' + line + b"\n"))


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path):
    assert "line 3: byte 0xff is not UTF-8" in error_of(write(tmp_path / "a.txt", b"one\ntwo\nthr\xffee\n"))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, keep: float):
    data = COMPRESS[suffix](bytes(range(256)).hex().encode() * 2000)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: int(len(data) * keep)])
    assert "to its end" in error_of(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_file_that_is_not_what_its_ending_says_is_named(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"plain text, no compression at all")
    assert "expected a whole" in error_of(path)

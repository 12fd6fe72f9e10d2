"""Every format is read, and everything that can be wrong with a source is said in one line."""

import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from odelm.data.sources.documents import checked, text_documents
from odelm.data.sources.files import ENDINGS, text_files
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
    if "jsonl" in ending:
        lines = [json.dumps({"text": text}) for text in TEXTS]
        path, expected = write(tmp_path / f"a{ending}", "\n\n".join(lines).encode()), TEXTS
    else:
        path, expected = write(tmp_path / f"a{ending}", TEXTS[0].encode()), TEXTS[:1]
    assert texts_of(path) == expected


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

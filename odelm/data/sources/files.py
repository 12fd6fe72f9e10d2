"""Finds source files and opens them, compressed or not; a damaged one is an InputError."""

import contextlib
import glob
import gzip
import io
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from odelm.errors import InputError, SystemFailure

KINDS = (".txt", ".jsonl")
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
ENDINGS = tuple(kind + compression for kind in KINDS for compression in COMPRESSIONS)
JSONL_ENDINGS = tuple(f".jsonl{compression}" for compression in COMPRESSIONS)
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__"})


def text_files(source: str, *, option: str = "data.source") -> list[Path]:
    """Returns the .txt and .jsonl files of `source`: `find_files` with the endings of text."""
    return find_files(source, ENDINGS, option=option)


def find_files(source: str, endings: tuple[str, ...], *, option: str = "data.source") -> list[Path]:
    """Returns the files of `source` (a file, a folder, a glob) with one of the endings, sorted by path.

    In a folder (searched recursively) and a glob, files of other kinds are passed over. Raises InputError
    if nothing is there, if nothing there is of a supported kind, or if a single file is not; `option` is what it
    calls the source.
    """
    path = Path(source).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = _walk(path)
    elif glob.has_magic(str(path)):
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)]
        if not found:
            raise InputError(f"{option} {source!r} matches no file; try the folder itself, or quote the pattern")
    else:
        raise InputError(f"{option} {source!r} does not exist; expected a file, a folder or a glob")
    files = sorted(file.absolute() for file in found if file.name.endswith(endings))
    if not files:
        raise InputError(f"{option} {source!r} has no file with a supported ending; expected {', '.join(endings)}")
    return files


def python_files() -> list[Path]:
    """Returns the .py files of the running interpreter's standard library, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in _walk(root, skip=NOT_LIBRARY) if file.suffix == ".py")
    if not files:
        raise InputError(f"the standard library has no .py files under {root}; use data.corpus='text' and data.source")
    return files


def _walk(root: Path, *, skip: frozenset[str] = frozenset()) -> list[Path]:
    """Returns all files under `root`, without the folders named in `skip` (`Path.rglob` takes ten times as long)."""
    found = []
    for folder, folders, names in os.walk(root, onerror=_unlisted):
        folders[:] = [name for name in folders if name not in skip]
        found.extend(Path(folder, name) for name in names)
    return found


def _unlisted(error: OSError) -> None:
    raise InputError(f"the folder {error.filename} cannot be listed ({error.strerror}); give another source")


def size_of(file: Path) -> int:
    """Returns the bytes of a file; raises InputError if there is none, as behind a broken link."""
    try:
        return file.stat().st_size
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); restore it, or remove the link to it") from error


def stats(files: list[Path]) -> list[tuple[str, int, int]]:
    """Returns (path, size in bytes, modification time in ns) of each file, which show whether one changed."""
    return [(shown(str(file)), size_of(file), file.stat().st_mtime_ns) for file in files]


def shown(name: str) -> str:
    """Decodes the name of a file or folder, replacing bytes that are not valid UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def stem(path: Path) -> str:
    """Returns a file's name without the endings that say its kind and compression."""
    name = shown(path.name)
    for ending in sorted((*ENDINGS, *COMPRESSIONS[1:]), key=len, reverse=True):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading its decompressed bytes; InputError if it cannot be read to its end."""
    with as_input_error(path), as_system_failure(path):
        with _decompressed(path) as file:
            yield file


@contextlib.contextmanager
def as_system_failure(place: Path | str) -> Iterator[None]:
    """Turns an error that the system reports, such as a failing disk, into a SystemFailure."""
    try:
        yield
    except OSError as error:
        # Those of a decompressor have no number.
        if error.errno is None:
            raise
        raise SystemFailure(f"{place} could not be read ({error}); mend that and run the same command") from error


@contextlib.contextmanager
def as_input_error(path: Path) -> Iterator[None]:
    """Turns the error of a decompressor into an InputError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise InputError(
            f"{path} cannot be read to its end ({error}); expected a whole {path.suffix} file: copy or make it again"
        ) from error


def _decompressed(path: Path) -> BinaryIO:
    if path.suffix in COMPRESSIONS[1:] and path.stat().st_size == 0:
        raise EOFError("it is empty")
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if path.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(path), 1 << 16))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames.

    zstandard's own reader takes a truncated file for a shorter one; this raises EOFError, as gzip does.
    """

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer) -> int:
        while not self._ready and self._advance():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _advance(self) -> bool:
        """Decompresses some more of the file; False at its end."""
        if self._frame.eof:
            data = self._frame.unused_data or self._file.read(1 << 16)
            if not data:
                return False
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        else:
            data = self._file.read(1 << 16)
            if not data:
                raise EOFError("the compressed data end before their end-of-frame mark")
        self._ready = self._frame.decompress(data)
        return True

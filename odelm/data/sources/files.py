"""Finds source files and opens them, compressed or not; a damaged one is an InputError."""

import contextlib
import glob
import gzip
import io
import lzma
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from odelm.errors import InputError, SystemFailure

COMPRESSIONS = ("", ".gz", ".xz", ".zst")
TXT_ENDINGS = tuple(f".txt{compression}" for compression in COMPRESSIONS)
JSONL_ENDINGS = (
    *(f"{kind}{compression}" for kind in (".jsonl", ".ndjson") for compression in COMPRESSIONS),
    # An uncompressed .json file is mostly one object, such as a folder's settings.
    *(f".json{compression}" for compression in COMPRESSIONS[1:]),
)
PARQUET_ENDINGS = (".parquet",)
ENDINGS = (*TXT_ENDINGS, *JSONL_ENDINGS, *PARQUET_ENDINGS)
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__"})


def text_files(source: str, *, option: str = "data.source") -> list[Path]:
    """Returns the text files of `source`: `find_files` with `ENDINGS`."""
    return find_files(source, ENDINGS, option=option)


def find_files(source: str, endings: tuple[str, ...], *, option: str = "data.source") -> list[Path]:
    """Returns the files of `source` (a file, a folder, a glob) with one of the endings, sorted by path.

    In a folder (searched recursively) and a glob, files that are hidden, not regular or have another ending are
    skipped, and a line on standard error says so. Links are followed, and each target is taken once. Raises InputError
    if nothing is there, if nothing there is of a supported kind, or if a single file is not; `option` names the source
    in messages.
    """
    path = Path(source).expanduser()
    passed = _PassedOver()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = _visible(path, passed)
    elif glob.has_magic(str(path)):
        found = _matching(path, passed)
        if not found:
            raise InputError(f"{option} {source!r} matches no file; try the folder itself, or quote the pattern")
    elif path.exists():
        raise InputError(f"{option} {source!r} is no regular file; expected a file, a folder or a glob")
    else:
        raise InputError(f"{option} {source!r} does not exist; expected a file, a folder or a glob")
    files = [file for file in found if file.name.lower().endswith(endings)]
    if not files:
        raise InputError(f"{option} {source!r} has no file with a supported ending; expected {', '.join(endings)}")
    passed.of_other_kinds = _once(sorted(set(found) - set(files)))
    files = _once(files)
    passed.tell(source)
    return [file.absolute() for file in files]


@dataclass
class _PassedOver:
    """The files of a source that are not read, by reason."""

    hidden: list[Path] = field(default_factory=list)
    irregular: list[Path] = field(default_factory=list)
    of_other_kinds: list[Path] = field(default_factory=list)

    def tell(self, source: str) -> None:
        said = [
            f"{len(paths)} {what} ({', '.join(shown(path.name) for path in paths[:3])}{', ...' if paths[3:] else ''})"
            for paths, what in (
                (self.hidden, "hidden"),
                (self.irregular, "not regular files"),
                (self.of_other_kinds, "of other kinds"),
            )
            if paths
        ]
        if said:
            print(f"passed over in {source}: {'; '.join(said)}", file=sys.stderr)


def _visible(root: Path, passed: _PassedOver) -> list[Path]:
    """Returns the regular files under `root` that are not hidden, sorted; each folder is entered once."""
    found, entered = [], {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=_unlisted, followlinks=True):
        hidden = sorted(name for name in (*folders, *names) if name.startswith("."))
        passed.hidden += [Path(folder, name) for name in hidden]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        # A folder that is also linked to is entered by its own name.
        folders[:] = [name for name in folders if real[name] not in entered]
        folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        for name in list(folders):
            if real[name] in entered:
                folders.remove(name)
            entered.add(real[name])
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return _regular(found, passed)


def _matching(pattern: Path, passed: _PassedOver) -> list[Path]:
    """Returns the regular files that match a glob, sorted; hidden ones only if the pattern itself names a dot."""
    return _regular([Path(name) for name in glob.glob(str(pattern), recursive=True)], passed)


def _regular(paths: list[Path], passed: _PassedOver) -> list[Path]:
    paths = sorted(path for path in paths if not path.is_dir())
    # A broken link is kept, so that it is named when it is read.
    files = [path for path in paths if path.is_file() or not path.exists()]
    passed.irregular += _once(sorted(set(paths) - set(files)))
    return files


def _once(files: list[Path]) -> list[Path]:
    """Returns the files, sorted, without second paths to the same file: its own path is preferred to links, and a
    shorter link to a longer one."""
    by_place: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: (os.path.realpath(file) != str(file.absolute()), len(file.parts), file)):
        by_place.setdefault(os.path.realpath(file), file)
    return sorted(by_place.values())


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
    """Returns the bytes of a file; raises InputError if there is no file, as behind a broken link."""
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
        if name.lower().endswith(ending):
            return name[: -len(ending)]
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
        # Errors of a decompressor have no number.
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
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS[1:] and path.stat().st_size == 0:
        raise EOFError("it is empty")
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if suffix == ".zst":
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

"""Checksums of every file of a directory, in the directory: `sha256sum -c manifest.sha256` reads them too.

A directory with a manifest is whole. Its last written file is the manifest, and every other file is in it, so that a
changed byte, a file cut short, one that is missing and one that was never listed are all found.
"""

import hashlib
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from odelm.files import writing

MANIFEST = "manifest.sha256"


class Damaged(Exception):
    """A directory is not what its manifest says; the message names the file and what is wrong with it."""


def write(directory: Path, *, but: Collection[str] = ()) -> None:
    """Writes the manifest of a directory in which nothing else is written any more, except for the files `but`."""
    names = [name for name in _files(directory) if name not in but]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _digest(directory / name), names)
    lines = [f"{digest}  {name}\n" for name, digest in zip(names, digests, strict=True)]
    with writing(directory / MANIFEST) as path, path.open("w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def check(directory: Path, *, only: Collection[str] | None = None) -> None:
    """Reads every file of a directory; raises `Damaged` for the first that is not what the manifest says.

    With `only`, the names of some files, others are not read, and may be missing or unlisted.
    """
    listed, there = _listed(directory), set(_files(directory))
    expected, found = (listed.keys(), there) if only is None else (set(only), set(only))
    missing, unlisted = expected - there, found - listed.keys()
    if missing:
        raise Damaged(f"{min(missing)} is missing")
    if unlisted:
        raise Damaged(f"{min(unlisted)} has no checksum in {MANIFEST}")
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _digest(directory / name), expected)
    for name, digest in zip(expected, digests, strict=True):
        if digest != listed[name]:
            raise Damaged(f"the checksum of {name} is wrong")


def is_sealed(directory: Path) -> bool:
    """Returns whether a directory has a manifest."""
    return (directory / MANIFEST).is_file()


def _listed(directory: Path) -> dict[str, str]:
    try:
        lines = (directory / MANIFEST).read_bytes().decode().splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (UnicodeDecodeError, ValueError) as error:
        raise Damaged(f"{MANIFEST} is no list of checksums") from error


def _files(directory: Path) -> list[str]:
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in paths if name != MANIFEST)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Files and directories that are either whole or absent, and the fingerprints that name them.

This holds however many processes write at once, and wherever they are interrupted.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from odelm.errors import InputError, SystemFailure


@contextlib.contextmanager
def publish(directory: Path, *, option: str = "data.data_dir") -> Iterator[Path]:
    """Yields a private directory that becomes `directory` when the block ends without an exception.

    Renaming is atomic, so a reader never sees a part. If another process was first, its result stays and
    ours is dropped: both hold the same, because the name of a cached directory encodes all that it depends on.

    Raises InputError where no directory can be made; `option` is the option that names another one.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    except OSError as error:
        raise InputError(f"{directory.parent} cannot be written ({error}); give another {option}") from error
    try:
        yield partial
        partial.chmod(0o755)
        try:
            os.rename(partial, directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def resumed(directory: Path) -> Iterator[Path | None]:
    """Yields a directory that becomes `directory` when the block ends, and None if it is there already.

    What was written when the block was interrupted stays, and the next call resumes from it; `writing` keeps each file
    of it whole. A mistake in the input leaves nothing, because once corrected the directory has another name; a failure
    of the system may not recur, so it leaves what is finished. One process works at a time and the others wait. Only
    the folder `result` in the yielded directory becomes `directory`; the rest is removed.

    Raises InputError where no directory can be made, and where the disk is full.
    """
    partial = directory.with_name(directory.name + ".partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with only_one(directory.parent / ".locks" / directory.name):
            if directory.is_dir():
                yield None
                return
            partial.mkdir(exist_ok=True)
            for left in partial.rglob(".writing-*"):
                left.unlink()
            try:
                yield partial
            except SystemFailure:
                raise
            except InputError:
                shutil.rmtree(partial)
                raise
            os.rename(partial / "result", directory)
            shutil.rmtree(partial)
    except OSError as error:
        raise InputError(
            f"{directory.parent} cannot be written ({error}); make room or give another data.data_dir. What is "
            "finished is kept, and the same command resumes from there"
        ) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields a path to write to that becomes `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".writing-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Lets one process at a time into the block; on a file system without locks, any number of them."""
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {lock.name}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


def data_folder(data_dir: str) -> Path:
    """Returns the folder that `data.data_dir` names; InputError if its path is not UTF-8, which ArrayRecord and the
    tokenizers library cannot write to."""
    folder = Path(data_dir).expanduser()
    whole_characters(f"data.data_dir {data_dir!r}", str(folder.absolute()))
    return folder


def is_url(path: Any) -> bool:
    """Returns whether a path is a URL, a place outside this machine's file system (see `odelm.remote`)."""
    return "://" in str(path)


def fingerprint(*parts: Any) -> str:
    """Returns 16 hex digits that are equal exactly when the parts (configs, strings, numbers) are."""
    plain = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]  # pyright: ignore
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def whole_characters(name: str, text: str) -> str:
    """Returns the text; InputError for one with half of a character, which no file and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!r} at character {error.start + 1}"
        raise InputError(f"{name} is not UTF-8: {found} is half of a character; write the character whole") from error
    return text

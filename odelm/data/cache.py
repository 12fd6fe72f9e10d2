"""Directories that are either whole or absent, however many processes write them and are interrupted."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from odelm.errors import InputError


@contextlib.contextmanager
def publish(directory: Path, *, option: str = "data.data_dir") -> Iterator[Path]:
    """Yields a private directory that becomes `directory` when the block ends without an exception.

    Renaming is atomic, so a reader never sees a part. If another process was first, its result stays and
    ours is dropped: both hold the same, because the name of a cached directory says all that it depends on.

    Raises InputError where no directory can be made; `option` is the one that names another.
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

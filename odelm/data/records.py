"""ArrayRecord files: records that are written in a row and read in any order."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter


@contextlib.contextmanager
def record_writer(path: Path, *, compress: bool = True) -> Iterator[ArrayRecordWriter]:
    """Yields a writer of single records; raises OSError where they could not all be written, as on a full disk."""
    with told_as_os_error():
        writer = ArrayRecordWriter(str(path), "group_size:1" if compress else "group_size:1,uncompressed")
        yield writer
        writer.close()


@contextlib.contextmanager
def told_as_os_error() -> Iterator[None]:
    """Makes an OSError of the RuntimeError by which ArrayRecord tells of a file that could not be written."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"\w+\(\) failed", str(error)):
            raise
        raise OSError(" ".join(str(error).split())) from error

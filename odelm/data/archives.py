"""OpenWebText as it is handed out: a tar of `urlsf_subset*_data.xz`, each an xz tar of one text file a document.

Gokaslan and Cohen 2019, https://skylion007.github.io/OpenWebTextCorpus.
"""

import contextlib
import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from odelm.data.documents import Records, tolerant, whole_file
from odelm.data.parts import Source
from odelm.errors import InputError

COMPONENT = "openwebtext"
OUTER, INNER = (".tar", ".tar.xz", ".tar.gz"), "_data.xz"


def members(path: Path) -> list[Source]:
    """Returns the inner archives of an outer tar, or where it is compressed, and can only be read through, it alone.

    Raises InputError if it is no tar, or ends early.
    """
    with _named(str(path)):
        try:
            with tarfile.open(path, "r:") as outer:
                files = [member for member in outer if member.isfile()]
            return [Source(path, member.size, member.offset_data, member.name) for member in files]
        except tarfile.ReadError as error:
            if "unexpected end" in str(error):
                raise
        with tarfile.open(path, "r|*"):
            return [Source(path, path.stat().st_size)]


def outer_documents(source: Source) -> Records:
    """Yields the documents of an inner archive that stands in an outer tar, or of a whole compressed outer tar."""
    with _named(str(source.path)), source.path.open("rb") as file:
        if source.member:
            file.seek(source.offset)
            yield from inner_documents(io.BytesIO(file.read(source.size)), f"{source.path}, member {source.member}")
            return
        with tarfile.open(fileobj=file, mode="r|*") as outer:
            for member in outer:
                inner = outer.extractfile(member) if member.isfile() else None
                if inner is not None:
                    # One that is damaged says nothing of those after it.
                    yield from tolerant(inner_documents(inner, f"{source.path}, member {member.name}"))


def extracted_documents(path: Path) -> Records:
    """Yields the documents of an inner archive that stands in a folder of its own."""
    with _named(str(path)), path.open("rb") as file:
        yield from inner_documents(file, str(path))


def inner_documents(file: IO[bytes], place: str) -> Records:
    """Yields the documents of an inner archive, read from front to end."""
    with _named(place), lzma.open(file) as data, tarfile.open(fileobj=data, mode="r|") as inner:
        for member in inner:
            text = inner.extractfile(member) if member.isfile() else None
            if text is not None:
                yield from whole_file(text.read(), f"{place}, file {member.name}", COMPONENT)


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Turns what can go wrong with an archive into an InputError that names it."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise InputError(
            f"{place} cannot be read to its end ({error}); expected a whole archive: copy or download it again"
        ) from error

"""OpenWebText as it is distributed: a tar of `urlsf_subset*_data.xz`, each an xz tar of one text file a document.

Gokaslan and Cohen 2019, https://skylion007.github.io/OpenWebTextCorpus.
"""

import contextlib
import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from odelm.data.sources.document_shards import Source
from odelm.data.sources.documents import Records, tolerant, whole_file
from odelm.data.sources.files import as_system_failure
from odelm.errors import InputError

COMPONENT = "openwebtext"
OUTER, INNER = (".tar", ".tar.xz", ".tar.gz"), "_data.xz"


class Header(tarfile.TarInfo):
    """A header that raises ReadError if it cannot be read: tarfile takes such a header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # pyright: ignore (base: `tarfile`)
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue] (typeshed leaves it out)
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a member or the archive's end should begin") from error


def members(path: Path) -> list[Source]:
    """Returns the inner archives of an outer tar; for a compressed tar, which has no random access, the tar itself.

    For a truncated tar, returns the readable members, preceded by a source of zero bytes that raises when it is read,
    so that the damage is reported. Raises InputError if the file is not a tar, or is empty.
    """
    with _named(str(path)):
        try:
            outer = tarfile.open(path, "r:", tarinfo=Header)
        except tarfile.ReadError:
            with tarfile.open(path, "r|*", tarinfo=Header):
                return [Source(path, path.stat().st_size)]
        found = []
        with outer:
            try:
                for member in outer:
                    if member.isfile():
                        found.append(Source(path, member.size, member.offset_data, member.name))
            except tarfile.TarError:
                found.insert(0, Source(path, 0))
        if not found:
            raise tarfile.ReadError("it holds no file")
        return found


def outer_documents(source: Source) -> Records:
    """Yields the documents of an inner archive in an outer tar, or of a whole compressed outer tar.

    A source of zero bytes is read to its end, which raises for the damage in it.
    """
    with _named(str(source.path)), source.path.open("rb") as file:
        if source.member:
            file.seek(source.offset)
            yield from inner_documents(io.BytesIO(file.read(source.size)), f"{source.path}, member {source.member}")
            return
        if not source.size:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as outer:
                outer.getmembers()
            return
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=Header) as outer:
            for member in outer:
                inner = outer.extractfile(member) if member.isfile() else None
                if inner is not None:
                    # Members after a damaged one may be whole.
                    yield from tolerant(inner_documents(inner, f"{source.path}, member {member.name}"))


def extracted_documents(path: Path) -> Records:
    """Yields the documents of an inner archive that is a file in a folder."""
    with _named(str(path)), path.open("rb") as file:
        yield from inner_documents(file, str(path))


def inner_documents(file: IO[bytes], place: str) -> Records:
    """Yields the documents of an inner archive, read from front to end."""
    with _named(place), lzma.open(file) as data, tarfile.open(fileobj=data, mode="r|", tarinfo=Header) as inner:
        for member in inner:
            text = inner.extractfile(member) if member.isfile() else None
            if text is not None:
                yield from whole_file(text.read(), f"{place}, file {member.name}", COMPONENT)


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Turns the errors of a damaged archive into an InputError that names it."""
    try:
        with as_system_failure(place):
            yield
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise InputError(
            f"{place} cannot be read to its end ({error}); expected a whole archive: copy or download it again"
        ) from error

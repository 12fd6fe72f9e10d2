"""A corpus that is one text file: its last part is held out, because a document cannot be in both splits."""

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odelm.data.sources.documents import Document, checked, text_documents
from odelm.errors import InputError

CUTS = ("\n\n", "\n", " ")
"""Where a text may be cut, the best place first."""


@dataclass(frozen=True)
class OneText:
    """A `odelm.data.corpus.Corpus` of two documents: the text before the cut, and the text after it."""

    name: str
    path: Path
    valid_fraction: float

    def prepare(self, *, workers: int = 0, beam: Any = None) -> None:
        """Only prints which part is held out: there is nothing to prepare."""
        document, cut = self._cut()
        _tell(self.path, len(document.text) - cut, len(document.text))

    def size(self, split: str) -> tuple[int, int]:
        document = next(self.documents(split))
        return 1, len(document.text.encode())

    def documents(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        document, cut = self._cut()
        part = document.text[:cut] if split == "train" else document.text[cut:]
        yield from [Document(part, document.component)][start:stop]

    def reader(self) -> "OneText":
        return self

    def report(self) -> Mapping[str, object]:
        return {"duplicates": 0, "bad_records": 0, "bad": []}

    def _cut(self) -> tuple[Document, int]:
        """Returns the document, and where its held-out part begins: after a paragraph, a line or a word if there is one
        near; raises InputError for a text of which one part would be blank."""
        document = next(checked(text_documents(self.path)), None)
        if document is None:
            raise InputError(f"{self.path} has no text")
        text, held = document.text, max(1, round(self.valid_fraction * len(document.text)))
        at = len(text) - held
        for mark in CUTS:
            found = text.rfind(mark, max(0, at - held), at)
            if found >= 0:
                at = found + len(mark)
                break
        if not text[:at].strip() or not text[at:].strip():
            raise InputError(
                f"{self.path} is too short to hold out a part of it: give more text, or change data.valid_fraction "
                f"(now {self.valid_fraction})"
            )
        return document, at


@functools.cache
def _tell(path: Path, held: int, size: int) -> None:
    """Prints which part is held out, once, however often a run asks for its corpus to be prepared."""
    print(
        f"{path} is one document: its last {held:,} of {size:,} characters are held out (data.valid_fraction, or give "
        "data.valid_source)",
        file=sys.stderr,
    )

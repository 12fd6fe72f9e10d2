"""Held-out rows in two halves: one to search on, and one that the search does not see."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from odelm.data.loader import HeldOutRows, NextTokenRows
from odelm.errors import InputError

LEAST_KEPT = 0.75
"""Documents are kept apart if at least this share of the rows is then of only one half."""
LEAST_DOCUMENTS = 5
"""Documents are kept apart if each half has at least this many: fewer say little about others."""


@dataclass(frozen=True)
class Part:
    """Some of the rows, and the units that they were drawn in."""

    rows: HeldOutRows
    units: np.ndarray
    """The number of the unit of each row, int64 (rows,)."""
    documents: int
    """How many documents are the units; 0 if each row is a unit, because documents could not be kept apart."""


def halves(rows: HeldOutRows) -> tuple[Part, Part]:
    """Returns two parts with about equally many tokens, and without a common document if that is possible.

    A row with documents of both parts is then left out. If too many rows would be left out, as with a few long
    documents, or short ones packed together, the parts take alternate rows instead. Raises InputError if there are
    fewer than four rows.
    """
    if len(rows) < 4:
        raise InputError(
            f"the held-out text has {len(rows)} rows of {rows.rows.size} tokens, too few to search on one half and to "
            "test on the other: give more text, or a shorter --length"
        )
    first, last = _documents(rows)
    # How many of the documents before each one belong to the second half.
    second = np.concatenate([[0], np.cumsum(_side_of_documents(rows, first))])
    of_second = second[last + 1] - second[first]
    one, other = (_part(rows, kept, first) for kept in (of_second == 0, of_second == last - first + 1))
    enough = len(one.rows) + len(other.rows) >= LEAST_KEPT * len(rows)
    if enough and min(one.documents, other.documents) >= LEAST_DOCUMENTS:
        return one, other
    even = np.arange(len(rows)) % 2 == 0
    return _part(rows, even, None), _part(rows, ~even, None)


def _part(rows: HeldOutRows, kept: np.ndarray, documents: np.ndarray | None) -> Part:
    """Returns the rows that are kept, with the documents (rows,) as units, or each row as one."""
    part = dataclasses.replace(rows, order=rows.order[kept])
    if documents is None:
        return Part(part, np.arange(len(part)), 0)
    names, units = np.unique(documents[kept], return_inverse=True)
    return Part(part, units, len(names))


def _documents(rows: HeldOutRows) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and the last document that each row predicts tokens of, int64 (rows,)."""
    starts, stops = rows.windows.spans(rows.order)
    # A decoder does not predict the first token of a row, which may be the end token of the document before.
    starts = np.minimum(starts + isinstance(rows.rows, NextTokenRows), stops - 1)
    first, last = (np.searchsorted(rows.ends, places, side="right") for places in (starts, stops - 1))
    return first, last


def _side_of_documents(rows: HeldOutRows, first: np.ndarray) -> np.ndarray:
    """Returns the half of each document, int64 (documents,): assigned from the longest on, each to the half with fewer
    tokens so far."""
    starts, stops = rows.windows.spans(rows.order)
    sizes = np.bincount(first, weights=stops - starts, minlength=len(rows.ends))
    side, filled = np.zeros(len(sizes), np.int64), np.zeros(2)
    for document in np.argsort(-sizes, kind="stable"):
        side[document] = filled[1] < filled[0]
        filled[side[document]] += sizes[document]
    return side

"""Held-out rows in two halves: one to search on, and one that the search does not see."""

import dataclasses

import numpy as np

from odelm.data.loader import HeldOutRows, NextTokenRows
from odelm.errors import InputError

LEAST_KEPT = 0.75
"""Documents are kept apart if so many of the rows are then of one half."""
LEAST_SHARE = 0.25
"""The smaller half has at least so many of the rows that are kept."""


def halves(rows: HeldOutRows) -> tuple[HeldOutRows, HeldOutRows]:
    """Returns two parts of about equally many tokens, which have no document in common where that can be.

    A row with documents of both is then left out. Where too many would be, as with a single long document, or short ones
    packed together, every other row goes to each half. Raises InputError if there are fewer than four rows.
    """
    if len(rows) < 4:
        raise InputError(
            f"the held-out text has {len(rows)} rows of {rows.rows.size} tokens, too few to search on one half and to "
            "test on the other: give more text, or a shorter --length"
        )
    first, last = _documents(rows)
    side = _side_of_documents(rows, first)
    # How many documents up to each belong to the second half.
    second = np.concatenate([[0], np.cumsum(side)])
    of_second = second[last + 1] - second[first]
    parts = [np.flatnonzero(of_second == 0), np.flatnonzero(of_second == last - first + 1)]
    kept = sum(map(len, parts))
    if kept < LEAST_KEPT * len(rows) or min(map(len, parts)) < LEAST_SHARE * kept:
        parts = [np.arange(0, len(rows), 2), np.arange(1, len(rows), 2)]
    one, other = (dataclasses.replace(rows, order=rows.order[part]) for part in parts)
    return one, other


def _documents(rows: HeldOutRows) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and the last document that each row predicts tokens of, int64 (rows,)."""
    starts, stops = rows.windows.spans(rows.order)
    # A decoder does not predict the first token of a row, which may be the end token of the document before.
    starts = np.minimum(starts + isinstance(rows.rows, NextTokenRows), stops - 1)
    first, last = (np.searchsorted(rows.ends, places, side="right") for places in (starts, stops - 1))
    return first, last


def _side_of_documents(rows: HeldOutRows, first: np.ndarray) -> np.ndarray:
    """Returns the half of each document, int64 (documents,): the longest first, each to the half that has less."""
    starts, stops = rows.windows.spans(rows.order)
    sizes = np.bincount(first, weights=stops - starts, minlength=len(rows.ends))
    side, filled = np.zeros(len(sizes), np.int64), [0.0, 0.0]
    for document in np.argsort(-sizes, kind="stable"):
        side[document] = filled[1] < filled[0]
        filled[side[document]] += sizes[document]
    return side

"""Held-out rows in two halves that share no document, where that can be."""

import numpy as np
import pytest

from odelm.data.loader import HeldOutRows, NextTokenRows
from odelm.data.tokens import Stream
from odelm.data.windows import DocumentWindows, StreamWindows
from odelm.errors import InputError
from odelm.evals.halves import halves


def rows_of(lengths: list[int], *, size: int = 9, documents: bool = False) -> HeldOutRows:
    """Returns the rows of documents of so many tokens, in a shuffled order."""
    stream = Stream(np.zeros(sum(lengths), np.uint16), np.array(lengths, np.int64))
    kind, more = (DocumentWindows, {"before": 1}) if documents else (StreamWindows, {})
    windows = kind(stream, size=size, stride=size - 1, **more)
    order = np.random.default_rng(0).permutation(len(windows))
    return HeldOutRows(windows, order, NextTokenRows(size - 1, 0), np.cumsum(lengths))


def predicted(rows: HeldOutRows) -> list[set[int]]:
    """Returns the documents that each row predicts tokens of."""
    owner = np.repeat(np.arange(len(rows.ends)), np.diff(rows.ends, prepend=0))
    return [set(owner[start + 1 : stop].tolist()) for start, stop in zip(*rows.windows.spans(rows.order), strict=True)]


@pytest.mark.parametrize("documents", [True, False])
def test_the_halves_have_no_document_in_common(documents):
    lengths = np.random.default_rng(1).integers(100, 400, 24).tolist()
    rows = rows_of(lengths, documents=documents)
    one, other = halves(rows)
    seen = [set().union(*predicted(part.rows)) for part in (one, other)]
    assert not seen[0] & seen[1] and min(one.documents, other.documents) >= 5
    kept = len(one.rows) + len(other.rows)
    assert kept == len(rows) if documents else 0.75 * len(rows) <= kept < len(rows)
    assert 0.8 < len(one.rows) / len(other.rows) < 1.25
    for part in (one, other):
        # The units are the documents of the rows, under numbers of their own.
        first = [min(documents) for documents in predicted(part.rows)]
        assert part.documents == len(set(first)) == part.units.max() + 1
        assert len(set(zip(first, part.units.tolist(), strict=True))) == part.documents
    again = halves(rows)
    assert all(np.array_equal(a.rows.order, b.rows.order) for a, b in zip((one, other), again, strict=True))


def test_halves_are_balanced_where_documents_are_of_unequal_length():
    one, other = halves(rows_of([1200, 100] * 10, documents=True))
    assert len(one.rows) / len(other.rows) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "lengths", [[4000], [400] * 8, [3] * 400], ids=["one document", "too few documents", "several in each row"]
)
def test_where_documents_cannot_be_kept_apart_every_other_row_is(lengths):
    rows = rows_of(lengths)
    one, other = halves(rows)
    assert sorted(np.concatenate([one.rows.order, other.rows.order])) == list(range(len(rows)))
    assert abs(len(one.rows) - len(other.rows)) <= 1
    for part in (one, other):
        assert part.documents == 0 and part.units.tolist() == list(range(len(part.rows)))


def test_a_text_of_a_few_rows_is_refused():
    with pytest.raises(InputError, match="3 rows of 9 tokens.*more text"):
        halves(rows_of([25]))

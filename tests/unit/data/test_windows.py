"""Windows lose and invent no token, keep documents apart where they should, and tokens are read at any place."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import documents, each_window, make_config, read, write_jsonl

from odelm import tokenizer as tokenizers
from odelm.data import prepare as prepare_module
from odelm.data import tokens
from odelm.data.loader import NextTokenRows
from odelm.data.prepare import prepare
from odelm.data.tokens import Stream, TokenStream
from odelm.data.windows import DocumentWindows, JoinedTokens, JoinedWindows, StreamWindows, Windows, joined

END = 1
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=8)
SIZES = st.integers(2, 9)


def stream_of(lengths: list[int]) -> Stream:
    """Returns documents of these lengths, each token another but the end tokens."""
    tokens = np.arange(2, 2 + sum(lengths), dtype=np.uint16)
    tokens[np.cumsum(lengths) - 1] = END
    return Stream(tokens, np.array(lengths))


def places_of(stream: Stream) -> Stream:
    """Returns the places 0, 1, ... of the tokens in their stead: a window of them says where it is from."""
    return Stream(np.arange(len(stream.tokens)), stream.lengths)


def all_of(windows: Windows) -> list[list[int]]:
    return [window.tolist() for window in each_window(windows)] if len(windows) else []


@given(lengths=LENGTHS, size=SIZES, data=st.data())
def test_a_batch_holds_the_windows_that_were_asked_for_filled_up(lengths: list[int], size: int, data: st.DataObject):
    stream = stream_of(lengths)
    own = StreamWindows(stream, size=size, stride=size)
    parts = [own, DocumentWindows(stream, size=size, stride=size - 1, before=1)]
    for windows in (*parts, JoinedWindows(parts)):
        if not len(windows):
            continue
        every = all_of(windows)
        indices = data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=6))
        batch = windows.batch(np.array(indices, np.int64))
        assert batch["window"].shape == (len(indices), size) and batch["window"].dtype == np.int32
        for index, row, count in zip(indices, batch["window"], batch["count"], strict=True):
            assert row[:count].tolist() == every[index] and not row[count:].any()
    each = all_of(JoinedWindows(parts))
    assert each == [window for part in parts for window in all_of(part)]


def documents_of(lengths: list[int]) -> np.ndarray:
    """Returns which document each place is of."""
    return np.repeat(np.arange(len(lengths)), lengths)


@given(lengths=LENGTHS, size=SIZES)
def test_a_decoder_predicts_each_token_but_the_first_once(lengths: list[int], size: int):
    places = places_of(stream_of(lengths))
    stride = size - 1
    for windows in (
        StreamWindows(places, size=size, stride=stride),
        DocumentWindows(places, size=size, stride=stride, before=1),
    ):
        pairs = [pair for window in all_of(windows) for pair in itertools.pairwise(window)]
        assert pairs == list(itertools.pairwise(range(sum(lengths))))


@given(lengths=LENGTHS, size=SIZES)
def test_a_masked_row_holds_each_token_once(lengths: list[int], size: int):
    places = places_of(stream_of(lengths))
    total, ends = sum(lengths), set((np.cumsum(lengths) - 1).tolist())
    found = all_of(StreamWindows(places, size=size, stride=size))
    assert sum(found, []) == list(range(total))
    found = all_of(DocumentWindows(places, size=size, stride=size, after=-1))
    assert sum(found, []) == [place for place in range(total) if place not in ends], "less the end tokens"
    if total >= size:
        found = all_of(StreamWindows(places, size=size, stride=size, whole=True))
        assert {len(window) for window in found} == {size} and set(sum(found, [])) == set(range(total))
        assert len(found) == -(-total // size)


@given(lengths=LENGTHS, size=SIZES)
def test_a_window_of_documents_is_of_one_beyond_the_end_token_before_it(lengths: list[int], size: int):
    stream = stream_of(lengths)
    places, of = places_of(stream), documents_of(lengths)
    for window in all_of(DocumentWindows(places, size=size, stride=size - 1, before=1)):
        assert len(set(of[window[1:]])) == 1 and len(window) <= size
        assert of[window[0]] == of[window[1]] or stream.tokens[window[0]] == END
    for window in all_of(DocumentWindows(places, size=size, stride=size, after=-1)):
        assert len(set(of[window])) == 1 and window


@given(lengths=LENGTHS, size=SIZES)
def test_a_segment_predicts_tokens_of_its_own_document_alone(lengths: list[int], size: int):
    stream, of = stream_of(lengths), documents_of(lengths)
    rows = NextTokenRows(size - 1, END, segments=True)
    windows = StreamWindows(stream, size=rows.size, stride=rows.stride)
    where = StreamWindows(places_of(stream), size=rows.size, stride=rows.stride)
    for window, place in zip(each_window(windows), each_window(where), strict=True):
        count = len(window)
        padded = np.pad(window, (0, size - count))
        batch = rows.batch({"window": padded[None], "count": np.array([count])})
        segments, weights = batch["segments"][0], batch["weights"][0]
        assert weights.tolist() == [1.0] * (count - 1) + [0.0] * (size - count)
        seen = {}
        for segment, target, token in zip(segments, place[1:], place[:-1], strict=False):
            assert seen.setdefault(segment, of[target]) == of[target], "two documents in a segment"
            assert of[token] == of[target] or stream.tokens[token] == END
        assert len(set(seen.values())) == len(seen), "a document in two segments"


@given(many=st.lists(LENGTHS, min_size=1, max_size=4), bounds=st.tuples(*[st.none() | st.integers(-60, 60)] * 2))
def test_joined_tokens_are_those_of_all(many: list[list[int]], bounds: tuple):
    streams = [stream_of(lengths) for lengths in many]
    whole = np.concatenate([stream.tokens[:] for stream in streams])
    together = JoinedTokens([stream.tokens for stream in streams])
    assert len(together) == len(whole)
    np.testing.assert_array_equal(together[slice(*bounds)], whole[slice(*bounds)])
    stream = joined({str(number): each for number, each in enumerate(streams)})
    np.testing.assert_array_equal(stream.tokens[:], whole)
    assert stream.lengths.sum() == len(whole)


@given(
    units=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    before=st.integers(0, 3),
    chunk=st.integers(1, 6),
    bounds=st.tuples(*[st.none() | st.integers(-60, 60)] * 2),
)
@settings(deadline=None)
def test_a_slice_of_stored_tokens_is_that_of_an_array(units, before: int, chunk: int, bounds):
    """Each unit begins with records of another component, which are not to be read."""
    whole = np.arange(sum(units), dtype=np.uint16)
    records, pieces, start = [], [], 0
    for count in units:
        records += [b"never read"] * before
        pieces.append((len(records), count))
        own = whole[start : start + count]
        records += [own[first : first + chunk].tobytes() for first in range(0, count, chunk)]
        start += count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "RECORD_TOKENS", chunk)
        stored = TokenStream(records, pieces, np.dtype(np.uint16))
        assert len(stored) == len(whole)
        np.testing.assert_array_equal(stored[slice(*bounds)], whole[slice(*bounds)], strict=True)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A corpus of two components in records of 7 tokens and about ten units, and its documents."""
    folder = tmp_path_factory.mktemp("on_disk")
    for name, texts in (("a", documents(60)[:40]), ("b", documents(60)[40:])):
        write_jsonl(folder / f"{name}.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        for module in (tokens, prepare_module):
            patch.setattr(module, "RECORD_TOKENS", 7)
        patch.setattr(prepare_module, "SHARD_BYTES", 1500)
        config = make_config(folder, folder / "cache")
        prepared = prepare(config)
        assert len(list((prepared.directory / "train").glob("*.array_record"))) > 5
        expected = {}
        for document in read(config)["train"]:
            ids = [number for run in tokenizers.encode(prepared.tokenizer, [document.text]) for number in run]
            expected.setdefault(document.component, []).append(ids)
        yield prepared.train, expected


@settings(deadline=None)
@given(data=st.data())
def test_a_component_is_its_documents_in_order_read_from_anywhere(on_disk, data: st.DataObject):
    split, expected = on_disk
    assert split.keys() == expected.keys() == {"a", "b"}
    for name, stream in split.items():
        whole = np.array(sum(expected[name], []), np.uint16)
        assert stream.lengths.tolist() == [len(ids) for ids in expected[name]]
        first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
        np.testing.assert_array_equal(stream.tokens[first:second], whole[first:second], strict=True)

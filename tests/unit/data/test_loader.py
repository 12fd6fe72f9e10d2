"""No token is lost or invented, any position can be started from, and processes share a batch."""

import dataclasses
import itertools

import numpy as np
import pytest
from small_corpus import each_window, flat, split_of

from odelm.config import Config, replace
from odelm.data.loader import eval_batches, held_out_rows, train_batches
from odelm.data.tokens import Stream
from odelm.data.windows import StreamWindows
from odelm.errors import InputError


def config_of(shared, kind: str) -> Config:
    config = shared[1]()
    config = replace(config, {"model.kind": kind})
    if kind == "encoder":
        config = replace(config, {"model.sentence_order": True, "model.token_types": 2})
    return config


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(batches, count))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name, strict=True)


def restored(batch) -> np.ndarray:
    """Returns the tokens (B, L) of a masked batch as they were."""
    tokens, counted = batch["tokens"].copy(), batch["weights"] == 1
    rows = np.broadcast_to(np.arange(len(tokens))[:, None], counted.shape)
    tokens[rows[counted], batch["positions"][counted]] = batch["targets"][counted]
    return tokens


def shorten(prepared, **tokens):
    return dataclasses.replace(prepared, **{split: split_of(array) for split, array in tokens.items()})


@pytest.mark.parametrize("count", [17, 32, 33, 34, 100])
def test_windows_cover_every_token(count: int):
    stream = split_of(np.arange(count, dtype=np.uint16))["docs"]
    predicted = [token for window in each_window(StreamWindows(stream, size=17, stride=16)) for token in window[1:]]
    assert predicted == list(range(1, count))
    whole = each_window(StreamWindows(stream, size=16, stride=16, whole=True))
    assert {len(window) for window in whole} == {16} and set(np.concatenate(whole)) == set(range(count))


def test_every_token_is_a_target_once_an_epoch_and_epochs_differ(shared):
    prepared, config = shared[0], config_of(shared, "decoder")
    config = replace(config, {"train.batch_size": 1})
    windows = -(-(prepared.train_tokens - 1) // config.train.length)
    batches = take(train_batches(prepared, config), 2 * windows)
    orders = []
    for epoch in (batches[:windows], batches[windows:]):
        counted = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in epoch])
        assert len(counted) == prepared.train_tokens - 1
        np.testing.assert_array_equal(np.sort(counted), np.sort(flat(prepared.train)[1:]))
        orders.append(np.concatenate([batch["tokens"] for batch in epoch]))
        for batch in epoch:
            np.testing.assert_array_equal(batch["tokens"][0, 1:], batch["targets"][0, :-1])
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_starting_at_k_is_skipping_k_across_epochs(shared, kind: str):
    prepared, config = shared[0], config_of(shared, kind)
    epoch = -(-prepared.train_tokens // config.train.length) // config.train.batch_size
    whole = take(train_batches(prepared, config), 2 * epoch + 6)
    for start in (1, epoch - 1, 2 * epoch):
        for expected, got in zip(whole[start:], take(train_batches(prepared, config, start=start), 4), strict=False):
            assert_same(expected, got)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_shards_of_two_processes_make_the_batch_of_one(shared, kind: str):
    prepared, config = shared[0], config_of(shared, kind)
    whole = take(train_batches(prepared, config, start=3), 30)
    shards = [take(train_batches(prepared, config, start=3, process_index=p, process_count=2), 30) for p in (0, 1)]
    for batch, first, second in zip(whole, *shards, strict=True):
        assert_same(batch, {name: np.concatenate([first[name], second[name]]) for name in first})
    assert (shards[0][0]["tokens"] != shards[1][0]["tokens"]).any()


def test_shapes_types_and_the_documents_of_an_encoder_with_sentence_order(shared):
    prepared, config = shared[0], config_of(shared, "encoder")
    short = 0
    for batch in take(train_batches(prepared, config), 80):
        shapes = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
        row, few = ((4, 16), "int32"), ((4, 2), "int32")
        assert shapes == {
            "tokens": row,
            "token_types": row,
            "mask": ((4, 16), "bool"),
            "positions": few,
            "targets": few,
            "weights": ((4, 2), "float32"),
            "order": ((4,), "int32"),
            "order_weights": ((4,), "float32"),
        }
        assert not (batch["tokens"] == 1).any(), "an end token: a pair of segments is of one document"
        short += (~batch["mask"].all(axis=1)).sum()
    assert 0 < short < 80, "a document's last row is short, and no other"


def test_rows_of_an_encoder_without_sentence_order_are_full(shared):
    prepared, config = shared[0], config_of(shared, "encoder")
    config = replace(config, {"model.sentence_order": False})
    assert config.packing == "concatenate"
    assert all(batch["mask"].all() for batch in take(train_batches(prepared, config), 120))


def test_masks_are_new_every_epoch(shared):
    prepared, config = shared[0], config_of(shared, "encoder")
    prepared = shorten(prepared, train=flat(prepared.train)[:13])
    config = replace(config, {"train.batch_size": 1})
    seen = {batch["tokens"].tobytes() for batch in take(train_batches(prepared, config), 8)}
    assert len(seen) > 1


@pytest.mark.parametrize("count", [2, 17, 65, 66, 100])
def test_evaluation_counts_each_token_once(shared, count: int):
    prepared, config = shared[0], config_of(shared, "decoder")
    tokens = flat(prepared.validation)[:count]
    batches = list(eval_batches(shorten(prepared, validation=tokens), config))
    assert {batch["tokens"].shape for batch in batches} == {(4, 16)}
    counted = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
    np.testing.assert_array_equal(np.sort(counted), np.sort(tokens[1:]))
    assert all(batch["weights"].any() for batch in batches)


def test_evaluation_of_an_encoder_covers_the_split_with_fixed_masks(shared):
    prepared, config = shared[0], config_of(shared, "encoder")
    config = replace(config, {"model.sentence_order": False})
    first, second = (list(eval_batches(prepared, config)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)
    text = []
    for batch in first:
        text.extend(row[mask][1:-1] for row, mask in zip(restored(batch), batch["mask"], strict=True))
    np.testing.assert_array_equal(np.sort(np.concatenate(text)), np.sort(flat(prepared.validation)))


def test_evaluation_limit_length_and_batch_size(shared):
    prepared, config = shared[0], config_of(shared, "decoder")
    batches = list(eval_batches(prepared, config, length=8, batch_size=3, limit=2))
    assert [batch["tokens"].shape for batch in batches] == [(3, 8), (3, 8)]
    whole = np.concatenate([batch["targets"] for batch in eval_batches(prepared, config, length=8, batch_size=1)])
    np.testing.assert_array_equal(np.concatenate([batch["targets"] for batch in batches]), whole[:6])


def test_a_sample_of_the_held_out_split_is_random_and_always_the_same(shared):
    """Not its first documents: those of a few sources would stand for all."""
    prepared = shared[0]
    tokens = np.arange(1000, 1000 + 16 * 200 + 1).astype(np.uint16)
    split = shorten(prepared, validation=tokens)
    starts = []
    for seed in (0, 1):
        config = replace(config_of(shared, "decoder"), {"train.seed": seed})
        rows = held_out_rows(split, config, limit=50)
        assert len(rows) == 50
        starts.append(np.concatenate([batch["tokens"][:, 0] for batch in rows.batches(10)]))
    np.testing.assert_array_equal(*starts)
    assert len(set(starts[0])) == 50
    # The mean of 50 of 200 places is within 3 standard errors, 8 each, of the middle; the first 50 would be 75 off.
    assert abs((starts[0].mean() - 1000) / 16 - 100) < 24
    # A larger sample contains a smaller one.
    more = held_out_rows(split, config, limit=70)
    np.testing.assert_array_equal(more.order[:50], rows.order)


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
def test_a_sample_counts_the_documents_that_it_reads(shared, packing):
    config = replace(config_of(shared, "decoder"), {"data.packing": packing, "data.corpus": "text"})
    lengths = np.array([3, 40, 1, 1, 20, 64, 2, 5])
    stream = Stream(np.zeros(lengths.sum(), np.uint16) + 5, lengths)
    prepared = dataclasses.replace(shared[0], validation={"a": stream})
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for limit in (0, 1, 2, 3, 5):
        rows = held_out_rows(prepared, config, limit=limit)
        places = [np.arange(*span) for span in zip(*rows.windows.spans(rows.order), strict=True)]
        assert rows.documents == len(np.unique(owner[np.concatenate(places)]))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_evaluation_reads_the_same_rows_in_batches_of_any_size(shared, kind: str):
    prepared, config = shared[0], config_of(shared, kind)
    whole = list(eval_batches(prepared, config, batch_size=6, limit=1))
    cut = list(eval_batches(prepared, config, batch_size=2, limit=3))
    assert len(cut) == 3
    assert_same(whole[0], {name: np.concatenate([batch[name] for batch in cut]) for name in cut[0]})


def test_what_cannot_be_batched_is_said_with_its_numbers(shared):
    prepared, config = shared[0], config_of(shared, "decoder")
    with pytest.raises(InputError, match="batch_size is 4, expected a multiple of the 3"):
        train_batches(prepared, config, process_count=3)
    with pytest.raises(InputError, match="training split has 16 tokens, fewer than the 17"):
        train_batches(shorten(prepared, train=flat(prepared.train)[:16]), config)
    with pytest.raises(InputError, match="validation split has 1 tokens, fewer than the 2"):
        eval_batches(shorten(prepared, validation=flat(prepared.validation)[:1]), config)


def test_golden_order(shared):
    """The literals are what this corpus and seed 0 gave when this was written: a change means that a run cannot
    be resumed across it, nor repeated."""
    prepared, config = shared[0], config_of(shared, "decoder")
    batches = take(train_batches(prepared, config), 2)
    assert [batch["tokens"][:, :3].tolist() for batch in batches] == [
        [[261, 89, 86], [285, 261, 76], [298, 225, 70], [268, 71, 79]],
        [[285, 225, 76], [286, 264, 82], [82, 87, 296], [225, 299, 77]],
    ]
    batch = next(train_batches(prepared, config_of(shared, "encoder")))
    assert [batch[name].tolist() for name in ("positions", "targets", "order")] == [
        [[1, 11], [4, 15], [9, 11], [1, 12]],
        [[23, 267], [203, 0], [73, 203], [82, 261]],
        [0, 0, 0, 1],
    ]


def test_rows_of_an_encoder_tell_their_segments(shared):
    prepared, config = shared[0], config_of(shared, "encoder")
    config = replace(config, {"model.sentence_order": False, "data.packing": "segments"})
    highest = 0
    for batch in take(train_batches(prepared, config), 40):
        # An end token is the last of its document: the number rises after it.
        ends = np.cumsum(restored(batch) == 1, axis=1)
        expected = np.pad(ends[:, :-1], ((0, 0), (1, 0)))
        assert batch["segments"].dtype == np.int32
        np.testing.assert_array_equal(batch["segments"][:, :-1], expected[:, :-1])
        highest = max(highest, batch["segments"].max())
    assert highest > 0


def test_a_weighted_component_without_a_window_is_named(shared):
    prepared, config = shared[0], config_of(shared, "decoder")
    streams = {"docs": prepared.train["docs"], "few": split_of(np.array([1]))["docs"]}
    config = replace(config, {"data.components": ("docs", "few"), "data.weights": (1.0, 1.0)})
    with pytest.raises(InputError, match="few is too short for a single window of training text"):
        train_batches(dataclasses.replace(prepared, train=streams), config)


def test_small_components_share_rows(shared):
    """Forty components of a document each: without weights their windows are those of one stream, all full."""
    tokens = flat(shared[0].train)
    cuts = np.flatnonzero(tokens == 1)[:-1] + 1
    streams = {f"{number:02d}": split_of(part)["docs"] for number, part in enumerate(np.split(tokens, cuts))}
    for kind in ("decoder", "encoder"):
        config = config_of(shared, kind)
        config = replace(config, {"model.sentence_order": False})
        whole = take(train_batches(shorten(shared[0], train=tokens), config), 10)
        parted = take(train_batches(dataclasses.replace(shared[0], train=streams), config), 10)
        for one, other in zip(whole, parted, strict=True):
            assert_same(one, other)

"""Where a run is in its data can be saved and read back at any batch, by any number of workers and processes."""

import dataclasses
import itertools
import json
from collections.abc import Sequence

import numpy as np
import pytest
from grain._src.python.testing.experimental import assert_equal_output_after_checkpoint
from grain.experimental import LimitIterDataset
from small_corpus import each_window, flat, split_of

from odelm.config import Config, replace
from odelm.data.loader import Batch, eval_batches, train_batches, train_dataset
from odelm.data.tokens import Prepared, Stream
from odelm.data.windows import StreamWindows
from tests.thorough import few

WINDOWS = 30
"""Of 16 tokens, in the split that most tests cross more than twice; batches of 4 do not divide it."""

# name: model kind, sentence order, packing, weights
CASES = {
    "decoder, concatenate": ("decoder", False, "concatenate", ()),
    "decoder, segments": ("decoder", False, "segments", ()),
    "decoder, documents": ("decoder", False, "documents", ()),
    "decoder, mixture": ("decoder", False, "concatenate", (0.7, 0.3)),
    "decoder, mixture of documents": ("decoder", False, "documents", (0.7, 0.3)),
    "encoder, concatenate": ("encoder", False, "concatenate", ()),
    "encoder, documents": ("encoder", False, "documents", ()),
    "encoder, sentence order": ("encoder", True, "auto", ()),
    "encoder, mixture": ("encoder", True, "auto", (0.7, 0.3)),
}
CHOSEN = ["decoder, segments", "decoder, mixture of documents", "encoder, mixture"]
"""Both kinds, and a mixture of each."""


def made(shared, case: str, *, workers: int = 0, batch_size: int = 4) -> tuple[Prepared, Config]:
    """Returns a corpus of two components, of 20 and 10 windows, and a config for one of the cases."""
    kind, order, packing, weights = CASES[case]
    tokens = flat(shared[0].train)
    split = {"a": split_of(tokens[: 20 * 16])["docs"], "b": split_of(tokens[1000 : 1000 + 10 * 16])["docs"]}
    config = shared[1]()
    config = replace(config, {"model.kind": kind, "model.sentence_order": order, "data.packing": packing})
    config = replace(config, {"model.token_types": 2 if order else 0})
    config = replace(config, {"data.components": ("a", "b"), "data.weights": weights})
    config = replace(config, {"data.workers": workers, "train.batch_size": batch_size})
    config.validate()
    return dataclasses.replace(shared[0], train=split), config


def assert_same(first: Batch, second: Batch) -> None:
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name, strict=True)


def joined(shards: Sequence[Batch]) -> Batch:
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


@pytest.mark.parametrize("case", few(list(CASES), *CHOSEN))
def test_every_position_of_more_than_two_epochs_is_gone_on_from(shared, case: str):
    prepared, config = made(shared, case)
    assert_equal_output_after_checkpoint(LimitIterDataset(train_dataset(prepared, config), 17))


@pytest.mark.thorough
def test_so_it_is_with_a_process_that_makes_the_batches(shared):
    """In few positions: each starts the process anew."""
    prepared, config = made(shared, "encoder, mixture", workers=1)
    assert_equal_output_after_checkpoint(LimitIterDataset(train_dataset(prepared, config), 2))


@pytest.mark.thorough
def test_two_processes_that_read_shards_go_on_as_none_does(shared):
    prepared, config = shared[0], shared[1]()
    alone = train_batches(prepared, config)
    config = replace(config, {"data.workers": 2})
    several = train_batches(prepared, config)
    several.set_state({"update": 40})
    for batch in itertools.islice(alone, 40, 70):
        assert_same(batch, next(several))
    assert alone.get_state() == several.get_state() == {"update": 70}


@pytest.mark.parametrize(
    "case, processes",
    few(itertools.product(CASES, (2, 3, 6)), *zip(CHOSEN, itertools.cycle((2, 3, 6)))),
)
def test_rows_of_all_processes_make_the_batch(shared, case: str, processes: int):
    prepared, config = made(shared, case, batch_size=12)
    whole = train_batches(prepared, config, start=2)
    shards = [
        train_batches(prepared, config, start=2, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    for _ in range(5):
        rows = [next(shard) for shard in shards]
        assert {len(batch["tokens"]) for batch in rows} == {12 // processes}
        assert_same(next(whole), joined(rows))


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 3])
def test_every_window_once_an_epoch_whatever_the_processes(shared, processes: int):
    """Batches span epochs: fifteen of them are four epochs, or six."""
    size = 12 if processes == 3 else 8
    config = shared[1]()
    config = replace(config, {"train.batch_size": size})
    tokens = np.arange(2, 2 + WINDOWS * 16 + 1, dtype=np.uint16)
    prepared = dataclasses.replace(shared[0], train={"docs": Stream(tokens, np.array([len(tokens)]))})
    windows = {window.tobytes() for window in each_window(StreamWindows(prepared.train["docs"], size=17, stride=16))}
    assert len(windows) == WINDOWS
    shards = [
        train_batches(prepared, config, process_index=index, process_count=processes) for index in range(processes)
    ]
    batches = [joined([next(shard) for shard in shards]) for _ in range(2 * WINDOWS // 4)]
    rows = [np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1) for batch in batches]
    found = [row.tobytes() for row in np.concatenate(rows)]
    epochs = [found[start : start + WINDOWS] for start in range(0, len(found), WINDOWS)]
    assert len(epochs) == 15 * size // WINDOWS
    assert all(set(epoch) == windows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "each in another order"


def test_the_state_is_small_plain_and_of_no_process(shared):
    states = []
    for processes in (1, 2, 4):
        prepared, config = made(shared, "decoder, mixture")
        for index in range(processes):
            batches = train_batches(prepared, config, start=5, process_index=index, process_count=processes)
            for _ in range(3):
                next(batches)
            states.append(json.dumps(batches.get_state()))
    assert set(states) == {'{"update": 8}'} and len(states[0]) < 4000


@pytest.mark.parametrize("case", few(list(CASES), *CHOSEN))
def test_two_processes_are_gone_on_from_by_one_and_by_four(shared, case: str):
    prepared, config = made(shared, case)
    saved = train_batches(prepared, config, process_index=1, process_count=2)
    for _ in range(9):
        next(saved)
    state = json.loads(json.dumps(saved.get_state()))
    expected = list(itertools.islice(train_batches(prepared, config), 13))[9:]
    for processes in (1, 4):
        shards = [
            train_batches(prepared, config, process_index=index, process_count=processes) for index in range(processes)
        ]
        for shard in shards:
            next(shard)
            shard.set_state(state)
        for batch in expected:
            assert_same(batch, joined([next(shard) for shard in shards]))


def test_shares_of_a_mixture_are_its_weights_and_each_component_has_its_own_epochs(shared):
    """8,000 rows: `a`, of 400 windows, is crossed 15 times, while `b`, of 3,000, is within its first."""
    config = shared[1]()
    config = replace(config, {"data.components": ("a", "b"), "data.weights": (0.75, 0.25)})
    config = replace(config, {"train.batch_size": 100})
    small, large = (np.arange(start, start + 16 * count + 1) for start, count in ((0, 400), (10_000, 3000)))
    split = {name: Stream(tokens, np.array([len(tokens)])) for name, tokens in (("a", small), ("b", large))}
    batches = train_batches(dataclasses.replace(shared[0], train=split), config)
    starts = np.concatenate([next(batches)["tokens"][:, 0] for _ in range(80)])
    of_small = starts < 10_000
    for begin in range(0, 8000, 1000):
        assert of_small[begin : begin + 1000].mean() == pytest.approx(0.75, abs=0.01)
    epochs = starts[of_small].reshape(15, 400)
    assert (np.sort(epochs, axis=1) == np.arange(0, 6400, 16)).all()
    assert len(np.unique(epochs, axis=0)) == 15, "each in another order"
    assert len(np.unique(starts[~of_small])) == 2000, "no window of `b` twice"


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("decoder")])
def test_evaluation_covers_the_held_out_windows_of_all_components_once(shared, case: str):
    prepared, config = made(shared, case)
    split = prepared.train
    batches = list(eval_batches(dataclasses.replace(prepared, validation=split), config))
    again = list(eval_batches(dataclasses.replace(prepared, validation=split), config))
    for first, second in zip(batches, again, strict=True):
        assert_same(first, second)
    counted = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
    np.testing.assert_array_equal(np.sort(counted), np.sort(flat(split)[1:]))
    assert {batch["tokens"].shape for batch in batches} == {(4, 16)}


def test_the_first_batches_of_evaluation_hold_something_of_each_component(shared):
    prepared, config = made(shared, "decoder, concatenate")
    split = {
        name: Stream(np.full(16 * 40 + 1, token, np.uint16), np.array([16 * 40 + 1]))
        for name, token in (("a", 7), ("b", 9))
    }
    batches = eval_batches(dataclasses.replace(prepared, validation=split), config, limit=4)
    assert {7, 9} <= {int(token) for batch in batches for token in np.unique(batch["tokens"])}

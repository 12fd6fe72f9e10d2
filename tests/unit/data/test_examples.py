"""Examples as rows of tokens, batches of them, and their order."""

import itertools
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from odelm import tokenizer as tokenizers
from odelm.config import Config, DataConfig, ModelConfig, TrainConfig, replace
from odelm.data.examples import counts_within, read_task_data, rows_of
from odelm.data.loader import train_batches
from odelm.data.prepare import prepare
from odelm.errors import InputError
from odelm.tokenizer import SPECIAL_TOKENS

PAD, _, CLS, SEP, _ = range(5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Returns a tokenizer of the words w0 to w39, whose ids are 5 to 44."""
    words = {name: number for number, name in enumerate([*SPECIAL_TOKENS, *(f"w{i}" for i in range(40)), "?"])}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(list(SPECIAL_TOKENS))
    return made


@pytest.fixture
def config(tokenizer, tmp_path) -> Config:
    lines = [f"{i}\tw{i} w{i + 1}\tw{i + 2}\t{('entailment', 'not_entailment')[i % 2]}" for i in range(11)]
    for name, rows in (("train", lines), ("dev", lines[:7])):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Config(
        model=ModelConfig(kind="encoder", vocab_size=64, width=16, heads=2, depth=4, max_length=16, token_types=2),
        data=DataConfig(task="rte", source=str(tmp_path), tokenizer=str(tmp_path / "tokenizer.json")),
        train=TrainConfig(batch_size=4, length=8),
    )


def test_a_row_is_that_of_bert(tokenizer):
    rows = rows_of((["w0 w1", "w7"], ["w2", "w8 w9"]), tokenizer, length=8)
    assert rows.tokens.tolist() == [[CLS, 5, 6, SEP, 7, SEP, PAD, PAD], [CLS, 12, SEP, 13, 14, SEP, PAD, PAD]]
    inputs = rows.inputs(token_types=True)
    assert inputs["token_types"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]]
    assert inputs["mask"].sum(axis=1).tolist() == [6, 6] and rows.cut == 0
    alone = rows_of((["w0 w1"],), tokenizer, length=6)
    assert alone.tokens.tolist() == [[CLS, 5, 6, SEP, PAD, PAD]]
    assert alone.inputs(token_types=True)["token_types"].sum() == 0
    assert "token_types" not in alone.inputs(token_types=False)


def test_the_longer_text_of_a_pair_is_cut_first_and_counted(tokenizer):
    words = " ".join(f"w{i}" for i in range(9))
    rows = rows_of(([words, "w0", words], ["w20 w21", words, "w20"]), tokenizer, length=10)
    assert rows.tokens[0].tolist() == [CLS, 5, 6, 7, 8, 9, SEP, 25, 26, SEP]
    assert rows.tokens[1].tolist() == [CLS, 5, SEP, *range(5, 11), SEP]
    assert rows.cut == 3 and rows_of((["w0", words],), tokenizer, length=5).cut == 1


def test_counts_are_those_of_taking_a_token_off_the_longer_text_again_and_again():
    def one_by_one(first: int, second: int, room: int) -> list[int]:
        while first + second > room:
            first, second = (first - 1, second) if first > second else (first, second - 1)
        return [first, second]

    for room in (4, 7):
        sizes = np.array(list(itertools.product(range(1, 11), repeat=2))).T
        expected = [one_by_one(first, second, room) for first, second in sizes.T.tolist()]
        assert counts_within(sizes, room).T.tolist() == expected


def test_text_that_spells_a_special_token_is_text(tokenizer):
    rows = rows_of((["w0 <|sep|> w1"],), tokenizer, length=16)
    assert (rows.tokens == SEP).sum() == 1


@pytest.mark.parametrize(("texts", "length"), [((["w0"],), 2), ((["w0"], ["w1"]), 4)])
def test_a_row_without_room_is_refused(tokenizer, texts, length):
    with pytest.raises(InputError, match=f"a row of {length} tokens has no room.*expected {length + 1} or more"):
        rows_of(texts, tokenizer, length=length)
    assert rows_of(texts, tokenizer, length=length + 1).lengths.tolist() == [length + 1]


def test_a_batch_is_padded_with_rows_that_count_for_nothing(config):
    batches = list(read_task_data(config).held_out().batches(4))
    assert [batch["weights"].ravel().tolist() for batch in batches] == [[1, 1, 1, 1], [1, 1, 1, 0]]
    last = batches[-1]
    assert {name: (array.dtype.name, array.shape) for name, array in last.items()} == {
        "tokens": ("int32", (4, 8)), "mask": ("bool", (4, 8)), "token_types": ("int32", (4, 8)),
        "targets": ("int32", (4, 1)), "weights": ("float32", (4, 1)),
    }  # fmt: skip
    assert last["mask"].any(axis=1).all(), "attention of a row without tokens would be nan"
    found = np.concatenate([batch["tokens"][:, 1] for batch in batches])[:7]
    assert sorted(found) == list(range(5, 12)) and found.tolist() != sorted(found)
    # A class belongs to its text.
    assert ((batches[0]["tokens"][:, 1] - 5) % 2 == batches[0]["targets"][:, 0]).all()


def test_scores_are_of_the_examples_in_the_order_of_the_batches(config):
    held_out = read_task_data(config).held_out()
    targets = np.concatenate([batch["targets"][:, 0] for batch in held_out.batches(4)])
    outputs = np.eye(2)[targets]
    outputs[-1] = outputs[-1][::-1]  # the row of padding
    assert len(outputs) == 8 and held_out.scores(outputs) == {"accuracy": 1.0}
    outputs[0] = outputs[0][::-1]
    assert held_out.scores(outputs) == {"accuracy": pytest.approx(6 / 7)}
    # Of the examples 0 to 6 four are of class 0, which most of the training examples are of.
    assert held_out.majority() == {"accuracy": pytest.approx(4 / 7)}
    assert len(read_task_data(config).held_out(3)) == 3


def test_a_model_without_token_types_gets_none(config):
    batch = next(train_batches(read_task_data(replace(config, {"model.token_types": 0})), config))
    assert "token_types" not in batch


def test_every_epoch_has_each_example_once_and_a_position_can_be_set(config):
    data = read_task_data(config)
    batches = list(itertools.islice(train_batches(data, config), 11))
    firsts = np.concatenate([batch["tokens"][:, 1] for batch in batches]) - 5
    epochs = firsts.reshape(4, 11)
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    resumed = next(train_batches(data, config, start=5))
    np.testing.assert_array_equal(resumed["tokens"], batches[5]["tokens"])
    halves = [next(train_batches(data, config, start=5, process_index=i, process_count=2))["tokens"] for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), batches[5]["tokens"])
    other = next(train_batches(data, replace(config, {"train.seed": 1})))
    assert (other["tokens"] != batches[0]["tokens"]).any()


def test_what_workers_are_sent_can_be_pickled(config):
    train = read_task_data(config).train
    again = pickle.loads(pickle.dumps(train.batch))(np.array([3, 1]))
    np.testing.assert_array_equal(again["tokens"], train.batch(np.array([3, 1]))["tokens"])


def test_the_digest_is_that_of_tokens_and_labels(config, tmp_path):
    before = read_task_data(config).digest
    assert before == read_task_data(config).digest
    text = (tmp_path / "train.tsv").read_text()
    (tmp_path / "train.tsv").write_text(text.replace("0\tw0 w1\tw2\tentailment", "0\tw0 w1\tw2\tnot_entailment"))
    assert read_task_data(config).digest != before


def test_the_summary_counts(config):
    summary = read_task_data(replace(config, {"train.length": 5})).summary
    assert summary.startswith("rte: 11 training examples, 2.8 updates an epoch, and 7 that are evaluated; 18 longer")


def test_without_a_tokenizer_one_is_trained_once(config, tmp_path, monkeypatch):
    config = replace(config, {"data.tokenizer": "", "data.data_dir": str(tmp_path / "data"), "model.vocab_size": 280})
    first = read_task_data(config)
    with pytest.raises(InputError, match="the vocabulary is 100 tokens"):
        read_task_data(replace(config, {"model.vocab_size": 100}))
    monkeypatch.setattr(tokenizers, "train", None)
    assert read_task_data(config).digest == first.digest and first.tokenizer.get_vocab_size() <= 280


def test_a_tokenizer_without_special_tokens_is_refused(config, tmp_path):
    Tokenizer(models.WordLevel({"w0": 0, "?": 1}, unk_token="?")).save(str(tmp_path / "bare.json"))
    with pytest.raises(InputError, match="the tokenizer has no cls token"):
        read_task_data(replace(config, {"data.tokenizer": str(tmp_path / "bare.json")}))


def test_examples_are_not_prepared_ahead(config):
    with pytest.raises(InputError, match="the examples of a task are not prepared ahead"):
        prepare(config)

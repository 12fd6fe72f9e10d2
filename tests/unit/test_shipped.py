"""The models that come with odelm: whole, small, found by name, and with the losses that they were shipped with."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import bundle, shipped
from odelm.config import Config, InitConfig
from odelm.data.loader import NextTokenRows
from odelm.data.masking import masked_rows
from odelm.models.loss import inputs_of, mean_loss, sums_from_hidden
from odelm.train.start import init_from_pretrained

NEXT = NextTokenRows(length=64, end=0)

LOSSES = {"small-decoder": {10: 3.7111, 1: 3.8012}, "small-encoder": {10: 2.6886, 1: 2.8751}}
"""Of the first tokens of each document of their held-out text, nats/token, float32, by steps of the core."""


def test_each_is_a_bundle_of_ten_megabytes_at_most_with_a_card_and_text():
    assert shipped.names() == sorted(LOSSES)
    for name in shipped.names():
        folder = shipped.found(name)
        assert sum(file.stat().st_size for file in folder.iterdir()) < 10_000_000
        assert bundle.read_about(folder)["files"].keys() == {"config.json", "model.safetensors", "tokenizer.json"}
        assert name in (folder / "README.md").read_text().splitlines()[0]
        assert all(json.loads(line)["text"] for line in (folder / shipped.HELD_OUT).read_text().splitlines())


def test_what_is_no_model_is_told_with_what_there_is(tmp_path):
    with pytest.raises(odelm.InputError, match="nothing is not a directory; give a training run.*small-decoder"):
        odelm.load(tmp_path / "nothing")
    for path, words in ((None, "None"), ("", "''"), (3, "3")):
        with pytest.raises(odelm.InputError, match=f"^{words} is not a directory; give a training run.*small-decoder"):
            odelm.load(path)


@pytest.mark.parametrize("name", LOSSES)
def test_its_losses_are_those_that_it_was_shipped_with(name):
    model, config, tokenizer = odelm.load(name)
    texts = [json.loads(line)["text"] for line in Path(shipped.held_out(shipped.found(name))).read_text().splitlines()]
    ids = np.array([one.ids[:65] for one in tokenizer.encode_batch(texts)], np.int32)
    rows = masked_rows(tokenizer, config, length=64, stream="eval_mask") if model.config.kind == "encoder" else NEXT
    window = {"window": ids[:, : rows.size], "count": np.full(len(ids), rows.size), "index": np.arange(len(ids))}
    batch = rows.batch(window)
    graph, params = nnx.split(model)

    @partial(jax.jit, static_argnames="steps")
    def loss(params, steps):
        model = nnx.merge(graph, params)
        return sums_from_hidden(model, model.encode(inputs_of(batch), steps=steps), batch)

    for steps, expected in LOSSES[name].items():
        assert mean_loss([loss(params, steps)]).loss == pytest.approx(expected, abs=2e-3)


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.found("small-decoder") == shipped.FOLDER / "small-decoder"
    Path("small-decoder").mkdir()
    assert shipped.found("small-decoder") == Path("small-decoder") and shipped.name_of(Path("small-decoder")) is None
    assert shipped.found("other") == Path("other") and shipped.reports(Path("other")) is None


def test_training_starts_from_it_with_its_tokenizer():
    config = Config(init=InitConfig(from_pretrained="small-decoder"))
    found = init_from_pretrained(config)
    assert found.tokenizer == shipped.FOLDER / "small-decoder" / "tokenizer.json"
    assert found.model.config.width == 384 and "starts from small-decoder" in found.summary

"""Where fine-tuning can start from, what its model becomes, and which configs are refused."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import interop
from odelm.config import replace
from odelm.models import Classifier, Encoder
from odelm.models.parameters import parameters
from odelm.run_directory import RunDirectory
from odelm.train.start import find_start
from tests.calls import compiled
from tests.unit.interop.conftest import ALBERT, GPT2

BERT = {name: value for name, value in ALBERT.items() if name != "embed_dim"} | dict(groups=4)


@pytest.fixture
def config(tmp_path) -> odelm.Config:
    return odelm.Config(
        model=odelm.ModelConfig(kind="encoder", width=16, heads=2, depth=4, max_length=16),
        data=odelm.DataConfig(task="rte", source=str(tmp_path), tokenizer="tokenizer.json"),
        train=odelm.TrainConfig(length=16),
    )


def start_of(config: odelm.Config, tmp_path):
    return find_start(config, RunDirectory(tmp_path / "run"))


def from_folder(config: odelm.Config, folder, **options) -> odelm.Config:
    init = odelm.InitConfig(from_pretrained=str(folder), **options)
    return dataclasses.replace(config, init=init, model=odelm.ModelConfig())


@pytest.mark.parametrize(("task", "outputs"), [("rte", 2), ("stsb", 1)])
def test_a_task_says_how_many_outputs_a_model_has(config, tmp_path, task, outputs):
    config = replace(config, {"data.task": task, "model.sentence_order": True, "data.packing": "documents"})
    start = start_of(config, tmp_path)
    assert (start.config.model.outputs, start.config.model.sentence_order) == (outputs, False)
    model = odelm.create(start.config.model, rngs=nnx.Rngs(0))
    assert isinstance(model, Classifier) and model.head.out.out_features == outputs


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_new_classifier_has_either_placement_of_norms(config, tmp_path, placement):
    config = replace(config, {"model.norm_placement": placement})
    assert start_of(config, tmp_path).config.model.norm_placement == placement


@pytest.mark.parametrize("sentence_order", [True, False])
def test_an_albert_keeps_its_body_and_its_pooler(config, make_model, tokens, tmp_path, sentence_order):
    source = make_model(**ALBERT, sentence_order=sentence_order)
    interop.export(source, tmp_path / "albert")
    start = start_of(from_folder(config, tmp_path / "albert"), tmp_path)
    model = start.pretrained.model
    assert isinstance(model, Classifier) and start.config.model.outputs == 2
    assert "as a classifier of rte" in start.pretrained.summary
    # Time modulation is new, and has no effect yet.
    np.testing.assert_array_equal(
        compiled(model.encode)(tokens, steps=2), compiled(odelm.load(tmp_path / "albert")[0].encode)(tokens, steps=2)
    )
    pooler = np.asarray(parameters(model)["head/pool/kernel"])
    assert not sentence_order or (pooler == parameters(source)["order/pool/kernel"]).all()


def test_a_bare_bert_with_a_block_for_each_layer_can_be_shared(config, make_config, randomise, tmp_path):
    bare = randomise(Encoder(make_config(**BERT), pooled=True, rngs=nnx.Rngs(0)))
    interop.export(bare, tmp_path / "bert")
    own = replace(from_folder(config, tmp_path / "bert"), {"step_sampling.kind": "fixed"})
    start = start_of(own, tmp_path)
    assert start.config.model.groups == 4 and start.config.eval_steps == (4,)
    np.testing.assert_array_equal(
        parameters(start.pretrained.model)["head/pool/kernel"], parameters(bare)["pool/kernel"]
    )
    shared = start_of(from_folder(config, tmp_path / "bert", groups=1), tmp_path)
    assert (shared.config.model.groups, shared.config.trained_counts) == (1, (1, 2, 4))
    assert "shared 4 blocks as 1" in shared.pretrained.summary
    with pytest.raises(odelm.InputError, match="step_sampling.kind is 'random_count'.*init.groups"):
        start_of(from_folder(config, tmp_path / "bert"), tmp_path)


def test_a_classifier_gets_a_new_last_layer(config, make_config, randomise, tmp_path):
    source = randomise(Classifier(make_config(**ALBERT), outputs=3, rngs=nnx.Rngs(0)))
    interop.export(source, tmp_path / "albert")
    start = start_of(from_folder(config, tmp_path / "albert"), tmp_path)
    assert parameters(start.pretrained.model)["head/out/kernel"].shape == (16, 2)


def test_a_decoder_is_refused(config, make_model, tmp_path):
    interop.export(make_model(**GPT2), tmp_path / "gpt2")
    with pytest.raises(odelm.InputError, match="gpt2 is a decoder .CausalLM., but data.task is 'rte': .* an encoder"):
        start_of(from_folder(config, tmp_path / "gpt2"), tmp_path)


REFUSED = {
    "task": ({"data.task": "sst-3"}, "data.task is 'sst-3'; .*choices: cola, mrpc"),
    "source": ({"data.source": ""}, "data.task is 'rte', but data.source is empty"),
    "decoder": ({"model.kind": "decoder"}, "data.task is 'rte', but model.kind is 'decoder'"),
    "outputs": ({"model.outputs": 3}, "model.outputs is 3, but the task 'rte' has 2"),
    "share": ({"data.train_share": 1.0}, "data.train_share is 1.0, expected a share"),
    "share of no task": ({"data.task": "", "data.train_share": 0.5}, "but data.task is empty"),
    "outputs without a task": ({"data.task": "", "model.outputs": 2}, "a classifier is trained on a data.task"),
    "classifier of a decoder": (
        {"data.task": "", "model.outputs": 2, "model.kind": "decoder"}, "a classifier is trained on a data.task",
    ),
    "length": ({"train.length": 17}, "train.length is 17, but model.max_length is 16"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_config_that_cannot_be_is_refused(config, tmp_path, options, message):
    with pytest.raises(odelm.InputError, match=message):
        start_of(replace(config, options), tmp_path)


@pytest.mark.parametrize(
    "options", [dict(outputs=2), dict(outputs=2, kind="encoder", sentence_order=True), dict(outputs=-1)]
)
def test_a_model_that_is_no_classifier_has_no_outputs(options):
    with pytest.raises(odelm.InputError, match="model.outputs is"):
        odelm.ModelConfig(**options).validate()

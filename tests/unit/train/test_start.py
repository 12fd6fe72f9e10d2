"""Where a training can start from, and that it starts as what it starts from."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import interop, run_directory
from odelm.checkpoint import Checkpoints
from odelm.config import replace
from odelm.models import Encoder
from odelm.models.parameters import parameters
from odelm.train.start import init_from_pretrained
from tests.calls import compiled
from tests.thorough import few
from tests.unit.interop.conftest import ALBERT, GPT2


def config_of(source, *, options=None, **init) -> odelm.Config:
    config = odelm.Config(init=odelm.InitConfig(from_pretrained=str(source), **init))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **(options or {})))


@pytest.fixture
def folder(make_model, tmp_path):
    def make(**options):
        path = tmp_path / f"folder{len(list(tmp_path.iterdir()))}"
        interop.export(make_model(**options), path)
        return path

    return make


@pytest.fixture
def run(make_model, make_config, tmp_path):
    """Returns a run directory with one checkpoint of a modulated decoder."""
    from tokenizers import Tokenizer, models

    model, config = make_model(), odelm.Config(model=make_config(), train=odelm.TrainConfig(length=16))
    run_directory.save_config(tmp_path, config)
    (tmp_path / run_directory.TOKENIZER).write_text(Tokenizer(models.BPE()).to_str())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, nnx.state(model, nnx.Param), {"count": np.int32(3)})
    checkpoints.close()
    return tmp_path


@pytest.mark.parametrize("options", [ALBERT, ALBERT | dict(groups=2, inner_blocks=2), GPT2], ids=["1", "2", "gpt2"])
@pytest.mark.parametrize("steps", few([4, None], 4))
def test_update_0_gives_exactly_the_logits_of_the_folder(options, steps, folder, tokens):
    """Time modulation starts without effect: not one bit of a logit differs."""
    path = folder(**options)
    start = init_from_pretrained(config_of(path))
    assert start.model.config.time_modulation and any("modulation" in name for name in parameters(start.model))
    source, _, _ = odelm.load(path)
    np.testing.assert_array_equal(compiled(start.model)(tokens, steps=steps), compiled(source)(tokens, steps=steps))


def test_the_recipe_chooses_only_what_may_be_chosen(folder):
    options = dict(width=999, depth=7, time_modulation=False, dropout=0.25, dtype="bfloat16")
    model = init_from_pretrained(config_of(folder(**ALBERT), options=options)).model.config
    assert (model.width, model.depth) == (16, 4)
    assert (model.time_modulation, model.dropout, model.dtype) == (False, 0.25, "bfloat16")


@pytest.mark.parametrize(("merge", "rank"), few([("mean", 0), ("layer", 0), ("low_rank", 5)], ("low_rank", 5)))
def test_layers_are_shared_and_the_summary_says_so(merge, rank, folder, tokens):
    path = folder(**GPT2)
    start = init_from_pretrained(config_of(path, groups=1, merge=merge, rank=5))
    assert (start.model.config.groups, start.model.config.layer_rank) == (1, rank)
    assert "shared 4 blocks as 1" in start.summary and str(path) in start.summary
    assert np.isfinite(compiled(start.model)(tokens, steps=2)).all()


def test_a_run_can_be_started_from_too(run, make_model, tokens):
    start = init_from_pretrained(config_of(run))
    np.testing.assert_array_equal(compiled(start.model)(tokens, steps=2), compiled(make_model())(tokens, steps=2))
    assert start.tokenizer == run / run_directory.TOKENIZER
    with pytest.raises(odelm.InputError, match="was trained with model.time_modulation=True and needs it"):
        init_from_pretrained(config_of(run, options=dict(time_modulation=False)))


def test_a_model_without_a_language_head_is_no_start(make_config, tmp_path):
    model = Encoder(make_config(**ALBERT), pooled=False, rngs=nnx.Rngs(0))
    interop.export(model, tmp_path / "bare")
    with pytest.raises(odelm.InputError, match="is a Encoder, which lacks the head"):
        init_from_pretrained(config_of(tmp_path / "bare"))


def test_a_recipe_need_not_fit_a_model_that_does_not_count(folder, tmp_path):
    """The length and the weights are held against the folder's model, not against the one that the recipe has."""
    from odelm.train.run import train

    config = config_of(folder(**ALBERT), options=dict(max_length=8, depth=7))
    config = replace(config, {"train.length": 16, "step_sampling.counts": (), "step_sampling.weights": (1.0, 1.0, 1.0)})
    with pytest.raises(odelm.InputError, match="no tokenizer.json"):
        train(config, tmp_path / "run")
    config = replace(config, {"train.length": 17})
    with pytest.raises(odelm.InputError, match="train.length is 17, but model.max_length is 16"):
        train(config, tmp_path / "run")


def test_a_source_that_is_nothing_is_told(tmp_path):
    with pytest.raises(odelm.InputError, match="absent is not a directory"):
        init_from_pretrained(config_of(tmp_path / "absent"))


@pytest.mark.parametrize(("positions", "length"), [("rotary", 40), ("sinusoidal", 40), ("learned", 40), ("learned", 7)])
def test_a_longer_context_starts_where_the_shorter_one_was(positions, length, run, tokens, make_model, make_config):
    """Learned positions begin again after the last; the other kinds have as many as are asked for."""
    model, config = make_model(positions=positions), odelm.Config(model=make_config(positions=positions))
    run_directory.save_config(run, replace(config, {"train.length": 16}))
    checkpoints = Checkpoints(run)
    checkpoints.save(4, nnx.state(model, nnx.Param), {"count": np.int32(4)})
    checkpoints.close()
    start = init_from_pretrained(config_of(run, max_length=length))
    assert start.model.config.max_length == length
    np.testing.assert_array_equal(compiled(start.model)(tokens), compiled(model)(tokens))
    if positions == "learned":
        table = model.embed.learned[...]
        np.testing.assert_array_equal(start.model.embed.learned[...], np.concatenate([table] * 3)[:length])
    assert compiled(start.model)(np.zeros((1, length), np.int32)).shape == (1, length, 13)


def test_a_length_without_a_model_is_refused():
    with pytest.raises(odelm.InputError, match="init.max_length is of init.from_pretrained, which is empty"):
        odelm.Config(init=odelm.InitConfig(max_length=64)).validate()

"""What we write, `transformers` loads whole and computes alike, and it comes back to the bit."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import interop
from odelm.models import Classifier, Encoder
from odelm.models.parameters import parameters
from tests.calls import compiled
from tests.interop.conftest import Inputs, difference, needed

torch = needed("torch")
transformers = needed("transformers")

RELATIVE = 2e-5
"""As in test_arithmetic."""

GPT2 = dict(norm="layernorm", norm_eps=1e-5, positions="learned", qk_norm=False, bias=True, time_modulation=False)
ALBERT = GPT2 | dict(kind="encoder", norm_placement="post", embed_norm=True, embed_dim=8, token_types=2)

# Name of the case: options of the model, the architecture it becomes, and whether the weights come back as they were.
WRITTEN = {
    "albert": (ALBERT, "AlbertForMaskedLM", True),
    "albert order": (ALBERT | dict(sentence_order=True), "AlbertForPreTraining", True),
    "albert groups": (ALBERT | dict(groups=2, activation="relu"), "AlbertForMaskedLM", True),
    "albert inner": (ALBERT | dict(groups=2, inner_blocks=2), "AlbertForMaskedLM", True),
    "albert untied": (ALBERT | dict(tie_readout=False), "AlbertForMaskedLM", True),
    "albert unprojected": (ALBERT | dict(embed_dim=None), "AlbertForMaskedLM", False),
    "albert bare": (ALBERT | dict(bias=False, positions="sinusoidal", token_types=0), "AlbertForMaskedLM", False),
    "albert modulated": (ALBERT | dict(time_modulation=True, groups=2), "AlbertForMaskedLM", False),
    "albert low rank": (ALBERT | dict(layer_rank=3), "AlbertForMaskedLM", False),
    "bert": (ALBERT | dict(embed_dim=None, groups=4), "BertForMaskedLM", True),
    "bert order": (ALBERT | dict(embed_dim=None, groups=4, sentence_order=True), "BertForPreTraining", True),
    "bert modulated": (ALBERT | dict(embed_dim=None, time_modulation=True), "BertForMaskedLM", False),
    "bert inner": (ALBERT | dict(embed_dim=None, groups=4, inner_blocks=2), "BertForMaskedLM", False),
    "gpt2": (GPT2 | dict(groups=4), "GPT2LMHeadModel", True),
    "gpt2 untied": (GPT2 | dict(groups=4, tie_readout=False, activation="relu2"), "GPT2LMHeadModel", True),
    "gpt2 shared": (GPT2, "GPT2LMHeadModel", False),
    "gpt2 groups": (GPT2 | dict(groups=2, activation="silu"), "GPT2LMHeadModel", False),
    "gpt2 modulated": (GPT2 | dict(time_modulation=True, layer_rank=2), "GPT2LMHeadModel", False),
    "gpt2 unbiased": (GPT2 | dict(bias=False, positions="sinusoidal"), "GPT2LMHeadModel", False),
    "gpt2 inner": (GPT2 | dict(inner_blocks=2), "GPT2LMHeadModel", False),
}


def transformers_model(folder, architecture: str):
    """Returns the loaded model; nothing may be missing, left over or of another shape."""
    assert json.loads((folder / "config.json").read_text())["architectures"] == [architecture]
    made, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return made.eval()


def logits_of(model, inputs: Inputs) -> np.ndarray:
    with torch.no_grad():
        out = model(**inputs.torch())
    return (out.prediction_logits if hasattr(out, "prediction_logits") else out.logits).numpy()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_gives_the_same_logits_and_comes_back(name, make_model, tmp_path):
    options, architecture, same = WRITTEN[name]
    ours = make_model(**options)
    interop.export(ours, tmp_path / "out")
    theirs = transformers_model(tmp_path / "out", architecture)
    inputs = Inputs.drawn(9, vocab_size=13, padded=3, types=bool(ours.config.token_types))
    got = logits_of(theirs, inputs)
    assert difference(got, ours(inputs["tokens"], **inputs.options()), inputs["mask"]) < RELATIVE

    theirs.save_pretrained(tmp_path / "again")
    back = interop.read(tmp_path / "again").model
    assert type(back) is type(ours)
    assert difference(compiled(back)(inputs["tokens"], **inputs.options()), got, inputs["mask"]) < RELATIVE
    if same:
        wanted, found = parameters(ours), parameters(back)
        assert found.keys() == wanted.keys()
        for parameter, array in wanted.items():
            np.testing.assert_array_equal(found[parameter], array, err_msg=parameter)
        ignored = dict(dtype="auto", dropout=0.0, feedforward=ours.config.feedforward)
        assert dataclasses.replace(back.config, **ignored) == dataclasses.replace(ours.config, **ignored)


def test_a_folder_comes_back_through_us_to_the_bit(make_model, tmp_path):
    """odelm -> folder -> transformers -> folder -> odelm -> folder: the two files of weights hold the same."""
    from safetensors.numpy import load_file

    interop.export(make_model(**ALBERT), tmp_path / "first")
    transformers_model(tmp_path / "first", "AlbertForMaskedLM").save_pretrained(tmp_path / "second")
    interop.export(interop.read(tmp_path / "second").model, tmp_path / "third")
    first, third = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "third"))
    assert first.keys() == third.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(third[name], tensor)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_classifiers_are_written(outputs, groups, make_config, randomise, tmp_path):
    config = make_config(**(ALBERT | dict(groups=groups, embed_dim=8 if groups == 1 else None)))
    ours = randomise(Classifier(config, outputs=outputs, rngs=nnx.Rngs(0)))
    interop.export(ours, tmp_path / "out")
    family = "Albert" if groups == 1 else "Bert"
    theirs = transformers_model(tmp_path / "out", f"{family}ForSequenceClassification")
    assert theirs.config.num_labels == outputs
    inputs = Inputs.drawn(9, vocab_size=13, padded=3, types=True)
    assert difference(logits_of(theirs, inputs), ours(inputs["tokens"], **inputs.options())) < RELATIVE


def test_an_encoder_without_a_head_is_written(make_config, randomise, tmp_path):
    ours = randomise(Encoder(make_config(**ALBERT), pooled=True, rngs=nnx.Rngs(0)))
    interop.export(ours, tmp_path / "out")
    theirs = transformers_model(tmp_path / "out", "AlbertModel")
    inputs = Inputs.drawn(9, vocab_size=13, padded=3, types=True)
    with torch.no_grad():
        pooled = theirs(**inputs.torch()).pooler_output.numpy()
    assert difference(pooled, ours(inputs["tokens"], **inputs.options())) < RELATIVE


def test_the_tokenizer_is_written_too(make_model, tmp_path):
    from odelm import tokenizer as tokenizers

    trained = tokenizers.train(["some words and other words"] * 20, vocab_size=270, max_bytes=10_000)
    model = make_model(**(ALBERT | dict(vocab_size=270)))
    interop.export(model, tmp_path / "out", tokenizer=trained)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = trained.encode("other words", add_special_tokens=False).ids
    assert theirs("other words")["input_ids"] == [2, *plain, 3]
    assert theirs.mask_token_id == 4 and theirs.pad_token_id == 0
    ids = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ids["bos_token_id"], ids["eos_token_id"]) == (2, 3)
    pair = theirs("other", "words")
    assert pair["token_type_ids"] == [0] * (pair["input_ids"].index(3) + 1) + [1] * (
        len(pair["input_ids"]) - 1 - pair["input_ids"].index(3)
    )
    _, config, tokenizer = odelm.load(tmp_path / "out")
    assert tokenizer is not None and config.data.tokenizer == str(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.encode("other words", add_special_tokens=False).ids == plain

"""A folder is read whole or refused with the name of what does not fit."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import odelm
from odelm import interop
from odelm.models import CausalLM, Classifier, Encoder, MaskedLM
from odelm.models.parameters import parameters
from tests.calls import compiled

WORDS = "embeddings.word_embeddings.weight"


def assert_same(left, right) -> None:
    one, other = parameters(left), parameters(right)
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_what_is_written_is_read_to_the_bit(albert, gpt2, make_model):
    from tests.unit.interop.conftest import ALBERT, GPT2

    model, config, tokenizer = odelm.load(albert)
    assert isinstance(model, MaskedLM) and tokenizer is None and config.model is model.config
    assert_same(model, make_model(**ALBERT))
    assert config.step_sampling.counts == () and config.step_counts == (4, 2, 1)
    model, _, _ = odelm.load(gpt2)
    assert isinstance(model, CausalLM)
    assert_same(model, make_model(**GPT2))


def test_a_missing_an_unexpected_and_a_misshapen_tensor_are_named(albert, change):
    def damage(tensors):
        tensors["predictions.more"] = np.zeros((2, 3), np.float32)
        tensors["albert.surplus"] = np.zeros(5, np.float32)
        tensors["predictions.dense.weight"] = tensors["predictions.dense.weight"].T
        del tensors["albert.encoder.embedding_hidden_mapping_in.bias"]

    change(albert, tensors=damage)
    with pytest.raises(odelm.InputError) as error:
        interop.read(albert)
    text = str(error.value)
    assert "encoder.embedding_hidden_mapping_in.bias is missing, shape (16,)" in text
    assert "surplus is unexpected, shape (5,)" in text and "predictions.more is unexpected, shape (2, 3)" in text
    assert "predictions.dense.weight has shape (16, 8), expected (8, 16)" in text
    assert "embedding_size 8, hidden_size 16" in text and str(albert) in text


def test_a_config_that_implies_other_shapes_is_told_shortly(albert, change):
    change(albert, hidden_size=32)
    with pytest.raises(odelm.InputError, match=r"has shape \(16,\), expected \(32,\).*and \d+ more.*hidden_size 32"):
        interop.read(albert)


def test_heads_beyond_those_of_the_architecture_are_set_aside(albert, change, make_model):
    from tests.unit.interop.conftest import ALBERT

    def pooler(tensors):
        tensors["albert.pooler.weight"], tensors["albert.pooler.bias"] = np.eye(16, dtype="f"), np.zeros(16, "f")

    change(albert, tensors=pooler)
    found = interop.read(albert)
    assert found.unused == ("pooler.bias", "pooler.weight")
    assert_same(found.model, make_model(**ALBERT))


def test_names_of_old_folders_are_known(albert, change, make_model):
    from tests.unit.interop.conftest import ALBERT

    def old(tensors):
        for name in list(tensors):
            renamed = name.removeprefix("albert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[renamed.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)
        tensors["embeddings.position_ids"] = np.arange(16)[None]
        tensors["predictions.decoder.weight"] = tensors.pop(WORDS)
        tensors["predictions.decoder.bias"] = tensors["predictions.bias"]

    change(albert, tensors=old)
    assert_same(interop.read(albert).model, make_model(**ALBERT))


def test_a_name_that_is_there_twice_is_refused(albert, change):
    def twice(tensors):
        tensors[WORDS] = tensors["albert." + WORDS]

    change(albert, tensors=twice)
    with pytest.raises(odelm.InputError, match=f"the folder has {WORDS} twice"):
        interop.read(albert)


@pytest.mark.parametrize("dtype", [np.int8, np.bool_])
def test_what_is_no_float_is_refused(dtype, albert, change):
    def cast(tensors):
        tensors["predictions.dense.weight"] = tensors["predictions.dense.weight"].astype(dtype)

    change(albert, tensors=cast)
    with pytest.raises(
        odelm.InputError, match="predictions.dense.weight in .* is (int8|bool); expected one of float16"
    ):
        interop.read(albert)


def test_the_decoder_bias_counts_where_two_differ(albert, change):
    def differ(tensors):
        tensors["predictions.decoder.bias"] = tensors["predictions.bias"] + 1

    before = parameters(interop.read(albert).model)["head/bias"]
    change(albert, tensors=differ)
    np.testing.assert_array_equal(parameters(interop.read(albert).model)["head/bias"], before + 1)


def test_the_architecture_says_whether_there_is_a_second_head(make_model, change, tmp_path):
    from tests.unit.interop.conftest import ALBERT

    interop.export(make_model(**ALBERT, sentence_order=True), tmp_path / "two")
    assert interop.read(tmp_path / "two").model.config.sentence_order
    change(tmp_path / "two", architectures=["AlbertForMaskedLM"])
    found = interop.read(tmp_path / "two")
    assert not found.model.config.sentence_order
    assert {name.split(".")[0] for name in found.unused} == {"pooler", "sop_classifier"}

    interop.export(make_model(**ALBERT), tmp_path / "one")
    change(tmp_path / "one", architectures=["AlbertForPreTraining"])
    with pytest.raises(odelm.InputError, match="pooler.weight is missing.*sop_classifier.classifier.weight is missing"):
        interop.read(tmp_path / "one")


def test_what_is_left_out_is_told(albert, change, capsys):
    change(albert, tensors=lambda t: t.update({"albert.pooler.bias": np.zeros(16, "f")}))
    odelm.load(albert)
    assert "left out of" in (told := capsys.readouterr().err) and "pooler.bias" in told


def test_a_tokenizer_larger_than_the_vocabulary_is_left_out(albert, make_model, tmp_path, capsys):
    from odelm import tokenizer as tokenizers
    from tests.unit.interop.conftest import ALBERT

    trained = tokenizers.train(["some words"], vocab_size=270, max_bytes=100)
    trained.save(str(albert / "tokenizer.json"))
    _, config, tokenizer = odelm.load(albert)
    assert tokenizer is None and config.data.tokenizer == ""
    assert "tokenizer.json is left out, so that no text can be read" in capsys.readouterr().err
    with pytest.raises(odelm.InputError, match="more than model.vocab_size 13"):
        interop.export(make_model(**ALBERT), tmp_path / "out", tokenizer=trained)
    assert not (tmp_path / "out").exists()


def test_other_names_of_gpt2s_fields_count(gpt2, change, tokens):
    before = interop.read(gpt2).model
    path = gpt2 / "config.json"
    config = json.loads(path.read_text())
    config["num_attention_heads"] = config.pop("n_head")
    path.write_text(json.dumps(config))
    after = interop.read(gpt2).model
    assert after.config.heads == before.config.heads == 2
    np.testing.assert_array_equal(compiled(after)(tokens), compiled(before)(tokens))
    change(gpt2, n_head=4)
    with pytest.raises(odelm.InputError, match="num_attention_heads 2 and n_head 4, which are one field"):
        interop.read(gpt2)


def test_a_folder_of_no_known_kind_is_told_so(albert):
    path = albert / "config.json"
    config = json.loads(path.read_text())
    del config["model_type"]
    path.write_text(json.dumps(config))
    with pytest.raises(odelm.InputError, match="is of model_type None, which has no equivalent"):
        odelm.load(albert)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"model_type": "albert", "hidden', "config.json, of a Hugging Face folder, cannot be read as JSON"),
        ("{", "config.json, of a Hugging Face folder, cannot be read as JSON"),
        ('["model_type"]', "config.json, of a Hugging Face folder, holds a list"),
        ("[" * 200_000, "cannot be read as JSON"),
    ],
)
def test_a_damaged_config_is_that_of_a_folder(albert, text, says):
    (albert / "config.json").write_text(text)
    with pytest.raises(odelm.InputError, match=says):
        odelm.load(albert)


def test_a_byte_order_mark_changes_nothing(albert):
    expected = odelm.load(albert)[0].config
    path = albert / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert odelm.load(albert)[0].config == expected


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_model_saved_inside_another_is_named(albert, prefix):
    from safetensors.numpy import load_file, save_file

    file = str(albert / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(odelm.InputError, match=f"begins with '{prefix}': the model was saved inside torch"):
        interop.read(albert)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"eos_token_id": 0}),
        ("config.json", {"eos_token_id": [0, 5]}),
        ("tokenizer_config.json", {"eos_token": "[EOS]"}),
        ("tokenizer_config.json", {"eos_token": {"content": "[EOS]"}}),
        ("special_tokens_map.json", {"eos_token": "[EOS]"}),
    ],
)
def test_the_end_token_is_what_a_decoders_folder_says(make_model, tmp_path, name, values):
    from tokenizers import Tokenizer, models

    vocab = {"[EOS]": 0} | {chr(97 + i): i + 1 for i in range(12)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[EOS]"))
    plain = dict(norm="layernorm", positions="learned", qk_norm=False, bias=True, time_modulation=False)
    interop.export(make_model(**plain), tmp_path / "gpt2", tokenizer=tokenizer)
    path = tmp_path / "gpt2" / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    assert odelm.load(tmp_path / "gpt2")[1].data.end_token == "[EOS]"
    interop.export(make_model(**plain), tmp_path / "again", tokenizer=tokenizer, end_token="[EOS]")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == 0
    assert odelm.load(tmp_path / "again")[1].data.end_token == "[EOS]"


def test_a_copy_that_differs_from_what_it_is_tied_to_is_refused(albert, change):
    def differ(tensors):
        tensors["predictions.decoder.weight"] = tensors["albert." + WORDS] + 1

    change(albert, tensors=differ)
    with pytest.raises(odelm.InputError, match="predictions.decoder.weight differs from embeddings.word_embeddings"):
        interop.read(albert)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (dict(model_type=["albert"]), r"model_type \['albert'\], which has no equivalent"),
        (dict(model_type="albret"), "model_type 'albret'.*did you mean 'albert'"),
        (dict(architectures=["AlbertForMultipleChoice"]), "AlbertForMultipleChoice.*choices: AlbertFor"),
        (dict(hidden_act="quick_gelu"), "hidden_act is 'quick_gelu'.*did you mean"),
        (dict(num_hidden_groups=3), r"num_hidden_groups is 3, which does not divide num_hidden_layers \(4\)"),
        (dict(position_embedding_type="relative_key"), "position_embedding_type is 'relative_key'.*only 'absolute'"),
        (dict(num_attention_heads=5), "model.heads is 5, which does not divide"),
        (dict(num_hidden_groups=0), "num_hidden_groups is 0 in config.json, expected a whole number above 0"),
        (dict(num_hidden_layers="4"), "num_hidden_layers is '4'"),
        (dict(type_vocab_size=0), "type_vocab_size is 0"),
        (dict(hidden_dropout_prob=None), "hidden_dropout_prob is None"),
        (dict(hidden_act=["gelu"]), "hidden_act is \\['gelu'\\]"),
        (dict(tie_word_embeddings=1), "tie_word_embeddings is 1.*expected true or false"),
        (dict(architectures=[1]), "architecture 1, which has no equivalent"),
        (dict(quantization_config={"bits": 4}), "is quantised"),
        (dict(num_hidden_layers=10**9, num_hidden_groups=10**9), "says 1000000000 layers, but there are only 28"),
        (dict(vocab_size=10**12), r"has shape \(13, 8\), expected \(1000000000000, 8\)"),
    ],
)
def test_what_has_no_equivalent_is_named(albert, change, config, says):
    change(albert, **config)
    with pytest.raises(odelm.InputError, match=says):
        interop.read(albert)


def test_without_an_architecture_the_tensors_tell(albert, change):
    change(albert, architectures=None)
    assert isinstance(interop.read(albert).model, MaskedLM)

    def bare(tensors):
        for name in [name for name in tensors if name.startswith("predictions.")]:
            del tensors[name]

    change(albert, tensors=bare)
    assert isinstance(interop.read(albert).model, Encoder)


def test_classes_are_counted_by_the_config(make_config, randomise, tmp_path):
    from tests.unit.interop.conftest import ALBERT

    model = randomise(Classifier(make_config(**ALBERT), outputs=3, rngs=nnx.Rngs(0)))
    interop.export(model, tmp_path / "out")
    back = interop.read(tmp_path / "out").model
    assert isinstance(back, Classifier)
    assert_same(back, model)


def shard(folder) -> dict[str, str]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_shards_are_put_together(albert, make_model):
    from tests.unit.interop.conftest import ALBERT

    shard(albert)
    assert_same(interop.read(albert).model, make_model(**ALBERT))


def test_shards_that_do_not_fit_their_index_are_told(albert):
    places = shard(albert)
    index = albert / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places | {"lost": next(iter(places.values()))}}))
    with pytest.raises(odelm.InputError, match="promises lost in model-"):
        interop.read(albert)
    for map in ([], None, {"a": 3}):
        index.write_text(json.dumps({"weight_map": map}))
        with pytest.raises(odelm.InputError, match="has no weight_map of tensors to files"):
            interop.read(albert)
    index.write_text(json.dumps({"weight_map": places | {"away": "../other.safetensors"}}))
    with pytest.raises(odelm.InputError, match="expected the name of a file beside it"):
        interop.read(albert)
    index.write_text(json.dumps({"weight_map": places}))
    (albert / next(iter(places.values()))).unlink()
    with pytest.raises(odelm.InputError, match="lacks model-0.*copy the folder again"):
        interop.read(albert)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_refused_with_the_way_out(albert, name):
    (albert / "model.safetensors").rename(albert / name)
    with pytest.raises(odelm.InputError, match=f"{name}, a pickle.*save_pretrained"):
        interop.read(albert)


def test_damaged_and_missing_files_are_named(albert):
    weights = albert / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(odelm.InputError, match="model.safetensors is not a whole safetensors file"):
        interop.read(albert)
    weights.unlink()
    with pytest.raises(odelm.InputError, match="has no model.safetensors"):
        interop.read(albert)
    (albert / "config.json").write_text("[" * 200_000)
    assert not interop.is_folder(albert)
    (albert / "config.json").write_text("{")
    assert not interop.is_folder(albert), "nothing is left that says so"
    with pytest.raises(odelm.InputError, match="config.json, of a Hugging Face folder, cannot be read as JSON"):
        interop.read(albert)


def test_a_folder_has_no_steps(albert):
    with pytest.raises(odelm.InputError, match="step=3 was given, but .* has no checkpoints"):
        odelm.load(albert, step=3)


def test_another_scale_of_attention_is_moved_into_the_queries(gpt2, change, tokens):
    plain = compiled(interop.read(gpt2).model)(tokens)
    change(gpt2, scale_attn_by_inverse_layer_idx=True)
    scaled = interop.read(gpt2).model
    assert np.abs(compiled(scaled)(tokens) - plain).max() > 1e-3
    wanted = parameters(interop.read(gpt2).model)["blocks/2/attention/qkv/kernel"]
    change(gpt2, scale_attn_by_inverse_layer_idx=False)
    before = parameters(interop.read(gpt2).model)["blocks/2/attention/qkv/kernel"]
    np.testing.assert_allclose(wanted[:, 0], before[:, 0] / 3, rtol=1e-6)
    np.testing.assert_array_equal(wanted[:, 1:], before[:, 1:])

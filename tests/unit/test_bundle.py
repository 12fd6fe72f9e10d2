"""A bundle gives back the model to the bit; one that is damaged names the file; nothing is half written."""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import odelm
from odelm import bundle, int8_storage, manifest
from odelm import profile as profiles
from odelm.config import Config, TrainConfig
from odelm.models import Classifier, Encoder
from odelm.models.parameters import parameters, with_parameters
from tests.calls import compiled
from tests.thorough import thorough
from tests.unit.test_sharding import MODELS

SMALL = Config(train=TrainConfig(length=16))
ENCODER = dict(kind="encoder", token_types=2, sentence_order=True, embed_dim=8, norm_placement="post", embed_norm=True)
ARTIFACT = ("forward.bin", b"a forward pass", {"steps": 2})
FILES = ("bundle.json", "config.json", "forward.bin", "model.safetensors", "tokenizer.json")
"""Those in the manifest."""


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))


@pytest.fixture
def whole(make_model, tokenizer, tmp_path):
    """Returns a bundle with every file that there can be."""
    model = make_model()
    profiles.write(profile_of(model), tmp_path / "source.json")
    bundle.write(
        tmp_path / "b", model, SMALL, tokenizer=tokenizer, step=7, profile=tmp_path / "source.json",
        artifacts=[ARTIFACT],
    )  # fmt: skip
    return tmp_path / "b"


def profile_of(model) -> profiles.Profile:
    return profiles.Profile((0.0, 1.0, 4.0), "euler", 2, 0.01, 0.0, 0.005, "text", 9, 2, profiles.fingerprint_of(model))


def sealed_again(folder, name, change):
    """Changes a file as somebody would who brings the sums up to date."""
    change(folder / name)
    if name != "bundle.json":
        about = json.loads((folder / "bundle.json").read_text())
        about["files"][name] = (folder / name).stat().st_size
        (folder / "bundle.json").write_text(json.dumps(about))
    manifest.write(folder)


def refused(folder) -> str:
    with pytest.raises(odelm.InputError) as error:
        odelm.load(folder)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        dict(), ENCODER, dict(groups=2), dict(prelude=1, coda=1), dict(embed_dim=8, tie_readout=False),
        dict(layer_rank=2), dict(lanes=2), *map(thorough, MODELS),
    ],
)  # fmt: skip
def test_a_model_comes_back_to_the_bit(options, make_model, tokens, tmp_path):
    model = make_model(**options)
    config = dataclasses.replace(SMALL, model=model.config)
    about = bundle.write(tmp_path / "b", model, config)
    again, config_again, tokenizer = odelm.load(tmp_path / "b")
    assert type(again) is type(model) and config_again == config and tokenizer is None
    before, after = parameters(model), parameters(again)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype == jnp.float32
        np.testing.assert_array_equal(array, after[name], strict=True)
    np.testing.assert_array_equal(compiled(model)(tokens, steps=2), compiled(again)(tokens, steps=2))
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == before.keys()
    assert about["files"].keys() == {"config.json", "model.safetensors"}


def test_large_parameters_can_be_stored_in_8_bits(make_model, tokens, tmp_path):
    model = make_model(width=64, vocab_size=96)
    sizes = {}
    for storage in ("full", "int8"):
        about = bundle.write(tmp_path / storage, model, SMALL, storage=storage)
        sizes[storage] = about["files"]["model.safetensors"]
    assert sizes["int8"] < 0.34 * sizes["full"]
    before, again = parameters(model), odelm.load(tmp_path / "int8")[0]
    for name, array in parameters(again).items():
        assert array.dtype == jnp.float32 and array.shape == before[name].shape
        if array.size < int8_storage.SMALLEST:
            np.testing.assert_array_equal(array, before[name])
            continue
        flat, found = (np.pad(np.ravel(a), (0, -a.size % 64)).reshape(-1, 64) for a in (before[name], array))
        # Half a step of each block, and the rounding of what is computed from it.
        assert (np.abs(found - flat).max(axis=1) <= np.abs(flat).max(axis=1) / 254 * 1.001).all()
        assert not np.array_equal(found, flat)
    bundle.write(tmp_path / "again", again, SMALL, storage="int8")
    twice = [load_file(tmp_path / folder / "model.safetensors") for folder in ("int8", "again")]
    for name, array in twice[0].items():
        np.testing.assert_array_equal(array, twice[1][name])
    with pytest.raises(odelm.InputError, match="storage is 'int4', expected one of full, int8"):
        bundle.write(tmp_path / "other", model, SMALL, storage="int4")


def test_8_bits_without_their_scales_are_refused(make_model, tmp_path):
    bundle.write(tmp_path / "b", make_model(width=64, vocab_size=96), SMALL, storage="int8")

    def cut(file):
        arrays = load_file(file)
        arrays["embed/tokens:scales"] = arrays["embed/tokens:scales"][:-1]
        save_file(arrays, str(file))

    sealed_again(tmp_path / "b", "model.safetensors", cut)
    assert re.search(r"the scales of embed/tokens of .* are \('float32', \(95,\)\), expected", refused(tmp_path / "b"))


def test_parameters_keep_their_dtypes(make_model, tmp_path):
    model = make_model()
    named = parameters(model)
    named["embed/tokens"] = named["embed/tokens"].astype(jnp.bfloat16)
    bundle.write(tmp_path / "b", with_parameters(model, named), SMALL)
    again = parameters(odelm.load(tmp_path / "b")[0])
    assert {name for name, array in again.items() if array.dtype == jnp.bfloat16} == {"embed/tokens"}
    np.testing.assert_array_equal(again["embed/tokens"], named["embed/tokens"])
    named["embed/tokens"] = np.ones(named["embed/tokens"].shape, np.int32)
    with pytest.raises(odelm.InputError, match="embed/tokens of the model is int32, expected one of float32"):
        bundle.write(tmp_path / "c", with_parameters(model, named), SMALL)


def test_everything_in_it_comes_back(whole, tokenizer):
    model, config, again = odelm.load(str(whole))
    assert model.profile == profile_of(model)
    assert again.to_str() == tokenizer.to_str()
    assert config.model.width == 16, "the model's own config is written, not that of the recipe"
    about = bundle.read_about(whole)
    assert about["step"] == bundle.updates(whole) == 7 and about["odelm"] == odelm.__version__
    assert about["artifacts"] == {"forward.bin": {"steps": 2}} and (whole / "forward.bin").read_bytes() == ARTIFACT[1]
    assert about["files"] == {name: (whole / name).stat().st_size for name in FILES if name != "bundle.json"}
    listed = [line.split("  ")[1] for line in (whole / manifest.MANIFEST).read_text().splitlines()]
    assert sorted(listed) == sorted(FILES)
    modes = {oct(path.stat().st_mode) for path in whole.iterdir()}
    assert len(modes) == 1, "who may read one file may read all of them"


def test_the_config_may_be_adjusted(whole):
    def adjust(config: Config) -> Config:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))

    model, config, _ = odelm.load(whole, adjust=adjust)
    assert config.model.dtype == model.config.dtype == "bfloat16"


MESH = """
import sys
import jax, numpy as np
import odelm
from odelm.config import MeshConfig
from odelm.models.parameters import parameters
from odelm.sharding import make_mesh

path = sys.argv[1]
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=1))
whole, cut = (parameters(odelm.load(path, mesh=where)[0]) for where in (None, mesh))
assert all(len(array.sharding.device_set) == 1 for array in whole.values())
kernel = cut["blocks/0/attention/qkv/kernel"]
assert kernel.addressable_shards[0].data.shape == (8, 3, 2, 8), kernel.sharding
assert all(np.array_equal(whole[name], cut[name]) for name in whole)
print("agree")
"""


@pytest.mark.thorough
def test_a_bundle_is_cut_over_a_mesh(whole):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", MESH, str(whole)], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.stdout == "agree\n", done.stderr


@pytest.mark.parametrize("name", [*FILES, manifest.MANIFEST, "profile.json"])
def test_a_missing_file_is_named(name, whole):
    (whole / name).unlink()
    assert f"{name} is missing" in refused(whole)


@pytest.mark.parametrize("name", [*FILES, manifest.MANIFEST, "profile.json"])
def test_an_altered_file_is_named(name, whole):
    data = bytearray((whole / name).read_bytes())
    data[len(data) // 2] ^= 1
    (whole / name).write_bytes(data)
    assert name in refused(whole)


@pytest.mark.parametrize("name", [*FILES, manifest.MANIFEST])
@pytest.mark.parametrize("kept", [0.0, 0.5, -1])
def test_a_truncated_file_is_named(name, kept, whole):
    data = (whole / name).read_bytes()
    (whole / name).write_bytes(data[: int(kept * len(data)) if kept >= 0 else -1])
    if name == manifest.MANIFEST and kept < 0:
        odelm.load(whole)  # only the last end of line is gone
    else:
        message = refused(whole)
        assert name in message and ("bytes in place of" in message or name in ("bundle.json", manifest.MANIFEST))


def test_a_profile_is_made_anew_in_a_bundle(whole):
    model = odelm.load(whole)[0]
    other = dataclasses.replace(profile_of(model), grid=(0.0, 2.0, 4.0), loss_increase=0.001)
    profiles.write(other, whole / "profile.json")
    assert odelm.load(whole)[0].profile == other
    (whole / "profile.json").write_text("{")
    assert "profile.json is damaged" in refused(whole)


def test_a_profile_in_the_manifest_of_an_older_bundle_may_be_made_anew_too(whole):
    about = json.loads((whole / "bundle.json").read_text())
    del about["profile"]
    about["files"]["profile.json"] = 1
    (whole / "bundle.json").write_text(json.dumps(about))
    manifest.write(whole)
    assert odelm.load(whole)[0].profile is not None
    values = json.loads((whole / "profile.json").read_text())
    del values["checksum"]
    (whole / "profile.json").write_text(json.dumps(values))
    assert "profile.json has" in refused(whole), "without a checksum of its own it is checked by the manifest"
    (whole / "profile.json").unlink()
    assert "profile.json is missing" in refused(whole)


def test_a_profile_without_a_checksum_gets_one(make_model, tmp_path):
    model, source = make_model(), tmp_path / "source.json"
    profiles.write(profile_of(model), source)
    values = json.loads(source.read_text())
    del values["checksum"]
    source.write_text(json.dumps(values))
    bundle.write(tmp_path / "b", model, SMALL, profile=source)
    path = tmp_path / "b" / "profile.json"
    path.write_text(path.read_text().replace("4.0", "3.0"))
    assert "its checksum is that of other values" in refused(tmp_path / "b")


def test_a_manifest_that_lacks_a_file_is_not_enough(whole):
    for name in FILES:
        lines = (whole / manifest.MANIFEST).read_text().splitlines(keepends=True)
        (whole / manifest.MANIFEST).write_text("".join(line for line in lines if not line.endswith(f"{name}\n")))
        assert f"{name} has no checksum in manifest.sha256" in refused(whole)
        (whole / manifest.MANIFEST).write_text("".join(lines))


def test_files_that_are_not_listed_are_not_read(make_model, tmp_path):
    bundle.write(tmp_path / "b", make_model(), SMALL)
    (tmp_path / "b" / "tokenizer.json").write_text("no tokenizer")
    (tmp_path / "b" / "infer").mkdir()
    (tmp_path / "b" / "infer" / "report.json").write_text("{}")
    assert odelm.load(tmp_path / "b")[2] is None


def test_nothing_is_unpickled(whole, monkeypatch):
    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *a, **k: pytest.fail("a pickle was read"))
    odelm.load(whole)


def test_what_does_not_fit_is_named(whole):
    def resized(file):
        config = json.loads(file.read_text())
        config["model"]["feedforward"] = 32
        file.write_text(json.dumps(config))

    sealed_again(whole, "config.json", resized)
    message = refused(whole)
    assert "blocks/0/feedforward/down/kernel of " in message and "(24, 16), but config.json gives (32, 16)" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays: arrays.pop("final_norm/scale"), "final_norm/scale of .* is absent, but config.json gives"),
        (lambda arrays: arrays.update(more=np.zeros(2, np.float32)), "more of .*, but config.json gives absent"),
        (lambda arrays: arrays.update({"final_norm/scale": np.ones(16, np.int32)}), "final_norm/scale of .* is I32"),
    ],
)
def test_parameters_of_another_model_are_refused(change, words, whole):
    def rewritten(file):
        arrays = load_file(file)
        change(arrays)
        save_file(arrays, file)

    sealed_again(whole, "model.safetensors", rewritten)
    with pytest.raises(odelm.InputError, match=words):
        odelm.load(whole)


def test_files_that_are_no_such_files_are_refused(whole):
    sealed_again(whole, "tokenizer.json", lambda file: file.write_text("{}"))
    assert "tokenizer.json is not a tokenizer.json" in refused(whole)
    sealed_again(whole, "model.safetensors", lambda file: file.write_bytes(b"no tensors"))
    assert "model.safetensors is not a whole safetensors file" in refused(whole)
    sealed_again(whole, "config.json", lambda file: file.write_text("no config"))
    assert "config.json: the config is not JSON" in refused(whole)
    for text, words in (
        ("{", "cannot be read as JSON"),
        ('{"format": 3}', "format 3, but this odelm reads 1 and 2"),
        ("[]", "None"),
    ):
        sealed_again(whole, "bundle.json", lambda file, text=text: file.write_text(text))
        assert words in refused(whole)


def test_a_step_is_of_a_run(whole):
    with pytest.raises(odelm.InputError, match="step=3 was given, but .* is a bundle, which has no checkpoints"):
        odelm.load(whole, step=3)


def test_what_is_there_is_not_overwritten(make_model, whole, tmp_path):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    (tmp_path / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("b", "file", "empty", "link"):
        with pytest.raises(odelm.InputError, match=f"{name} exists already; give a new directory"):
            bundle.write(tmp_path / name, make_model(), SMALL)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    assert (tmp_path / "file").read_text() == "kept" and not list((tmp_path / "empty").iterdir())


def test_one_that_is_written_meanwhile_is_not_overwritten(make_model, tmp_path):
    def slow():
        bundle.write(tmp_path / "b", make_model(), SMALL, step=1)
        yield ARTIFACT

    with pytest.raises(odelm.InputError, match="exists already: another process has just written it"):
        bundle.write(tmp_path / "b", make_model(), SMALL, step=2, artifacts=slow())
    assert bundle.read_about(tmp_path / "b")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_failed_write_leaves_nothing(make_model, tmp_path, monkeypatch):
    def failing():
        yield ARTIFACT
        raise RuntimeError("a program that cannot be lowered")

    with pytest.raises(RuntimeError, match="cannot be lowered"):
        bundle.write(tmp_path / "b", make_model(), SMALL, artifacts=failing())
    assert not list(tmp_path.iterdir())

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(odelm.InputError, match="b cannot be written .*No space left.*; make room"):
        bundle.write(tmp_path / "b", make_model(), SMALL)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_head_is_not_bundled(make_config, tmp_path):
    bare = Encoder(make_config(kind="encoder"), pooled=True, rngs=nnx.Rngs(0))
    with pytest.raises(
        odelm.InputError, match="the model is a Encoder, but a bundle holds a language model or a class"
    ):
        bundle.write(tmp_path / "b", bare, SMALL)
    assert not list(tmp_path.iterdir())


def test_a_classifier_is_bundled_as_it_is(make_config, randomise, tokens, tmp_path):
    classifier = randomise(Classifier(make_config(kind="encoder"), outputs=3, rngs=nnx.Rngs(0)))
    bundle.write(tmp_path / "b", classifier, SMALL)
    found, config, _ = odelm.load(tmp_path / "b")
    assert isinstance(found, Classifier) and config.model.outputs == 3
    np.testing.assert_array_equal(found(tokens, steps=2), classifier(tokens, steps=2))


def test_a_config_that_cannot_be_read_again_is_refused(make_model, tmp_path):
    with pytest.raises(odelm.InputError, match="train.length is 128, but model.max_length is 16"):
        bundle.write(tmp_path / "b", make_model(), Config())
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_not_a_bundle(tmp_path):
    (tmp_path / "manifest.sha256").write_text("")
    assert not bundle.is_bundle(tmp_path) and not bundle.is_bundle(tmp_path / "nowhere")
    with pytest.raises(odelm.InputError, match="has no config.json, so it is not a run"):
        odelm.load(tmp_path)


def test_a_profile_goes_only_with_the_parameters_that_it_is_of(make_model, tmp_path):
    """A bundle with another could not be loaded, nor its profile be removed without breaking the manifest."""
    model, source = make_model(width=64, vocab_size=96), tmp_path / "source.json"
    profiles.write(profile_of(model), source)
    about = bundle.write(tmp_path / "rounded", model, SMALL, storage="int8", profile=source)
    again = odelm.load(tmp_path / "rounded")[0]
    assert "profile.json" not in about["files"] and again.profile is None
    with pytest.raises(odelm.InputError, match="is of another model, or of other parameters"):
        bundle.write(tmp_path / "stale", again, SMALL, profile=source)
    assert not (tmp_path / "stale").exists()
    profiles.write(profile_of(again), source)
    bundle.write(tmp_path / "same", again, SMALL, storage="int8", profile=source)
    assert odelm.load(tmp_path / "same")[0].profile == profile_of(again)

"""The profile of a model: written, read back, and refused where it is damaged or of another model."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import interop
from odelm.errors import InputError
from odelm.infer.runner import Runner
from odelm.profile import PROFILE, Profile, fingerprint_of, found_for, read, read_for, write

MADE = Profile(
    grid=(0.0, 1.0, 4.0),
    solver="heun",
    evaluations=4,
    max_loss_increase=0.01,
    loss_increase=-0.002,
    loss_increase_bound=0.004,
    text="here",
    tokens=99,
    documents=7,
    fingerprint="0123456789abcdef",
)


def of(model) -> Profile:
    return dataclasses.replace(MADE, fingerprint=fingerprint_of(model))


def test_a_profile_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new" / PROFILE
    write(MADE, path)
    assert read(path) == MADE and MADE.steps == 2
    assert json.loads(path.read_text())["version"] == 1
    assert [file.name for file in path.parent.iterdir()] == [PROFILE]


CHANGES = {
    "no JSON": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "no version": lambda text: text.replace('"version"', '"versions"'),
    "no grid": lambda text: text.replace('"grid"', '"gird"'),
    "not increasing": lambda text: text.replace("1.0", "5.0"),
    "not numbers": lambda text: text.replace("1.0", '"a"'),
    "a solver of none": lambda text: text.replace("heun", "hen"),
    "an implicit solver": lambda text: text.replace("heun", "kvaerno3"),
    "not finite": lambda text: text.replace("0.004", "NaN"),
    "an increase in words": lambda text: text.replace("0.004", '"some"'),
    "no evaluations": lambda text: text.replace('"evaluations": 4', '"evaluations": 0'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_damaged_profile_is_refused(change, tmp_path):
    path = tmp_path / PROFILE
    write(MADE, path)
    text = re.sub(r',\n  "checksum": "\w+"', "", path.read_text())
    path.write_text(text)
    assert read(path) == MADE, "a file without a checksum is read as it is"
    path.write_text(change(text))
    with pytest.raises(InputError, match=f"{path} is damaged.*make it again by") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_profile_is_told(make_model, tmp_path):
    (tmp_path / PROFILE).write_text("[]")
    with pytest.raises(InputError, match=r"is damaged, or no profile \(KeyError\('version'\)"):
        read(tmp_path / PROFILE)
    for given, words in {
        "": "profile is '', expected the path",
        3: "profile is 3, expected",
        "no": "no is no file",
    }.items():
        with pytest.raises(InputError, match=words):
            found_for(make_model(), given)


def test_a_profile_that_was_changed_is_refused(tmp_path):
    path = tmp_path / PROFILE
    write(MADE, path)
    text = path.read_text()
    path.write_text(text.replace("0.004", "0.003"))
    with pytest.raises(InputError, match="is damaged.*its checksum is that of other values"):
        read(path)
    path.write_text(json.dumps(json.loads(text)))
    assert read(path) == MADE, "only the values count"


def test_a_profile_of_another_version_or_none_is_refused(tmp_path):
    path = tmp_path / PROFILE
    write(MADE, path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(InputError, match="version 7, expected 1; make it again"):
        read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="damaged"):
        read(path)
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot be written.*--out"):
        write(MADE, path / "below")


def test_a_fingerprint_is_of_shape_and_parameters(make_model, randomise):
    plain = make_model()
    own = fingerprint_of(plain)
    assert own == fingerprint_of(nnx.clone(plain)) and len(own) == 16
    assert own == fingerprint_of(make_model(dtype="float32", attention="xla"))
    others = [make_model(norm_eps=1e-5), make_model(groups=2), randomise(plain, scale=1e-6)]
    assert len({own, *map(fingerprint_of, others)}) == 4


def test_a_model_gets_its_own_profile_only(make_model, tmp_path):
    model, path = make_model(), tmp_path / PROFILE
    assert read_for(model, path) is None
    write(of(model), path)
    assert read_for(model, path) == of(model)
    with pytest.raises(InputError, match="is of another model, or of other parameters.*make it again.*remove the file"):
        read_for(make_model(groups=2), path)
    write(dataclasses.replace(of(model), grid=(0.0, 3.0)), path)
    with pytest.raises(InputError, match="is damaged.*expected 4"):
        read_for(model, path)


def test_a_profile_stays_with_a_model_and_changes_no_parameter(make_model, tokens):
    model = nnx.clone(make_model(dtype="float32"))
    assert model.profile is None
    graph, state = nnx.split(model, nnx.Param)
    model.profile = of(model)
    with_profile, same = nnx.split(model, nnx.Param)
    assert jax.tree.all(jax.tree.map(np.array_equal, state, same))
    assert (
        nnx.merge(with_profile, same).profile == nnx.clone(model).profile == Runner.of(model).model.profile == of(model)
    )
    assert nnx.merge(graph, state).profile is None
    hash(with_profile)
    np.testing.assert_array_equal(model(tokens), nnx.merge(graph, state)(tokens))
    assert "blocks" in nnx.tabulate(model, tokens)


def test_a_loaded_model_has_the_profile_that_is_beside_it(make_model, tmp_path):
    folder = tmp_path / "albert"
    shape = dict(
        kind="encoder", norm="layernorm", norm_placement="post", positions="learned", embed_norm=True, bias=True
    )
    model = make_model(**shape, qk_norm=False, time_modulation=False, embed_dim=8, token_types=2)
    interop.export(model, folder)
    assert odelm.load(folder)[0].profile is None
    profile = of(odelm.load(folder)[0])
    write(profile, folder / PROFILE)
    assert odelm.load(folder)[0].profile == profile
    assert odelm.load(folder, with_profile=False)[0].profile is None
    write(MADE, folder / PROFILE)
    with pytest.raises(InputError, match="another model"):
        odelm.load(folder)
    assert odelm.load(folder, with_profile=False)[0].profile is None

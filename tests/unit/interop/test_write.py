"""What has no equivalent is listed, and nothing is half written or overwritten."""

import json

import pytest
from flax import nnx

import odelm
from odelm import interop
from odelm.interop.tensors import (
    JOINED,
    JOINED_BIAS,
    MERGED,
    MERGED_TRANSPOSED,
    SAME,
    SPLIT,
    SPLIT_TRANSPOSED,
    TRANSPOSED,
)
from odelm.programs.interop import main
from tests.unit.interop.conftest import ALBERT, GPT2


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (SAME, (5,)), (TRANSPOSED, (3, 5)), (MERGED_TRANSPOSED, (2, 3, 5)), (SPLIT_TRANSPOSED, (5, 3, 2, 4)),
        (SPLIT, (3, 2, 4)), (MERGED, (2, 3, 5)), (JOINED, (5, 3, 2, 4)), (JOINED_BIAS, (3, 2, 4)),
    ],
)  # fmt: skip
def test_reading_inverts_writing(layout, shape, make_model):
    import numpy as np

    array = np.random.default_rng(0).standard_normal(shape)
    written = layout.write(array)
    assert all(tensor.ndim <= 2 for tensor in written)
    np.testing.assert_array_equal(layout.read(shape, written), array)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(), ["norm=rmsnorm", "qk_norm=True", "positions=rotary"]),
        (GPT2 | dict(activation="swiglu", parallel_branches=True), ["activation=swiglu", "parallel_branches=True"]),
        (GPT2 | dict(embed_dim=8, token_types=2), ["embed_dim=8", "token_types=2"]),
        (GPT2 | dict(norm_placement="post", embed_norm=True), ["norm_placement=post", "embed_norm=True"]),
        (ALBERT | dict(norm_placement="pre", embed_norm=False), ["norm_placement=pre", "embed_norm=False"]),
    ],
)
def test_options_without_an_equivalent_are_listed(options, named, make_config, tmp_path):
    model = odelm.create(make_config(**options), rngs=nnx.Rngs(0))
    with pytest.raises(odelm.InputError) as error:
        interop.export(model, tmp_path / "out")
    assert all(f"model.{name}" in str(error.value) for name in named), error.value
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_overwritten(albert, make_model):
    before = (albert / "model.safetensors").read_bytes()
    with pytest.raises(odelm.InputError, match="exists already; give a new directory"):
        interop.export(make_model(**ALBERT), albert)
    assert (albert / "model.safetensors").read_bytes() == before


def test_a_tilde_is_the_home_directory(make_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    interop.export(make_model(**ALBERT), "~/out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_cannot_be_written_leaves_nothing(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("odelm.interop.folder.json.dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        interop.export(make_model(**ALBERT), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_folder_and_tells_mistakes_in_a_line(albert, tmp_path, capsys):
    assert main(["export", f"--workdir={albert}", f"--to={tmp_path / 'again'}"]) == 0
    assert "AlbertForMaskedLM" in capsys.readouterr().out
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "albert"
    for arguments, word in ((["--to", str(albert)], "exists already"), (["--to=new", "--step=4"], "step=4")):
        assert main(["export", f"--workdir={albert}", *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error:") and word in lines[0]

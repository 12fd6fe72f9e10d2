"""A process that has JAX alone computes what the model computes, at any batch and length."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export as jax_export

import odelm
from odelm.infer import export
from odelm.infer.export import forward_artifacts
from odelm.infer.runner import in_compute_dtypes
from odelm.models.parameters import abstract_like, parameters, with_parameters
from tests.calls import compiled
from tests.thorough import few

ENCODER = dict(kind="encoder", token_types=2, sentence_order=True, embed_dim=8, norm_placement="post", embed_norm=True,
               positions="learned", norm="layernorm", bias=True)  # fmt: skip
CASES = {
    "decoder": (dict(), dict(steps=[2])),
    "encoder": (ENCODER, dict(steps=[2])),
    "groups": (dict(groups=2, positions="sinusoidal"), dict(steps=[2], solver="heun")),
    "ends": (dict(prelude=1, coda=1, embed_dim=8, activation="swiglu"), dict(steps=[1])),
    "layer_rank": (dict(layer_rank=2, tie_readout=False), dict(grids=[[0, 1.5, 4]])),
    "lanes": (dict(lanes=2, wide_modulation=True), dict(steps=[4])),
    "blocks": (dict(kind="encoder", inner_blocks=2), dict(steps=[2])),
}
SHAPES = ((1, 3), (2, 16))
SUMS = dict(rtol=1e-5, atol=1e-6)
"""The same float32 sums in another program, which may add in another order; logits are of order 1."""

# `argv` has a folder of artifacts and of arguments, beside which the logits are written.
JAX_ALONE = """
import sys

BLOCKED = ("odelm", "flax", "diffrax", "equinox", "optax", "orbax", "safetensors", "tokenizers")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
for name in BLOCKED:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} can be imported")

from pathlib import Path
import jax
import numpy as np

folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.jaxexport")):
    forward = jax.export.deserialize(path.read_bytes())
    for given in sorted(folder.glob(f"{path.stem}.*.npz")):
        logits = forward.call(*np.load(given).values())
        np.save(given.with_suffix(".npy"), logits)
print("done")
"""


def arguments(config: odelm.ModelConfig, batch: int, length: int) -> list[np.ndarray]:
    """Returns random tokens, and for an encoder a mask with some padding."""
    rng = np.random.default_rng(batch)
    tokens = rng.integers(0, config.vocab_size, (batch, length)).astype(np.int32)
    return [tokens] if config.kind == "decoder" else [tokens, rng.random((batch, length)) < 0.7]


def called(artifact: export.Artifact, *given: np.ndarray) -> np.ndarray:
    return np.asarray(jax_export.deserialize(artifact.data).call(*given))


def first(model, **options) -> export.Artifact:
    """Returns an artifact of two steps, unless the options say otherwise."""
    return next(forward_artifacts(model, **(dict(steps=[2]) | options)))


@pytest.fixture(scope="module")
def without_odelm(make_model, tmp_path_factory):
    """Returns a folder of artifacts, and of logits that a process without odelm has computed with them."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name, (options, way) in CASES.items():
        model = make_model(**options)
        (artifact,) = forward_artifacts(model, **way)
        (folder / f"{name}.jaxexport").write_bytes(artifact.data)
        for shape in SHAPES:
            np.savez(folder / f"{name}.{shape[0]}.npz", *arguments(model.config, *shape))
    command = [sys.executable, "-c", JAX_ALONE, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.stdout == "done\n", done.stderr
    return folder


@pytest.mark.parametrize("name", few(list(CASES), "decoder"))
def test_a_process_without_odelm_computes_the_models_logits(name, without_odelm, make_model):
    options, way = CASES[name]
    model = make_model(**options)
    (plan,) = [{"steps": n} for n in way.get("steps", ())] + [{"grid": grid} for grid in way.get("grids", ())]
    for shape in SHAPES:
        tokens, *mask = arguments(model.config, *shape)
        expected = compiled(model)(tokens, mask=mask[0] if mask else None, solver=way.get("solver", "euler"), **plan)
        logits = np.load(without_odelm / f"{name}.{shape[0]}.npy")
        assert logits.dtype == np.float32 and logits.shape == (*shape, 13)
        np.testing.assert_allclose(logits, expected, **SUMS)


def test_the_mask_counts(make_model):
    model = make_model(**ENCODER)
    artifact = first(model)
    tokens, mask = arguments(model.config, 2, 16)
    assert np.abs(called(artifact, tokens, mask) - called(artifact, tokens, np.ones_like(mask))).max() > 1e-3


def test_what_it_is_stands_beside_it(make_model):
    decoder, heun = first(make_model()), first(make_model(), solver="heun")
    encoder = first(make_model(**ENCODER), dtype="bfloat16")
    grid = first(make_model(), steps=[], grids=[[0, 1, 4]])
    assert decoder.name == "forward_2_steps.jaxexport"
    assert decoder.about == {
        "steps": 2,
        "grid": None,
        "solver": "euler",
        "evaluations": 2,
        "dtype": "float32",
        "arguments": ["tokens int32 (batch, length)"],
        "result": "logits float32 (batch, length, 13)",
        "max_length": 16,
        "platforms": ["cpu", "cuda", "tpu"],
        "jax": jax.__version__,
    }
    assert jax_export.deserialize(decoder.data).platforms == ("cpu", "cuda", "tpu")
    assert encoder.about["arguments"] == ["tokens int32 (batch, length)", "mask bool (batch, length)"]
    assert encoder.about["dtype"] == "bfloat16"
    assert grid.about["grid"] == [0, 1, 4] and grid.name.startswith("forward_2_steps_") and grid.name != heun.name
    assert heun.name == "forward_2_steps_heun.jaxexport" and heun.about["evaluations"] == 4


def test_each_count_is_exported_once(make_model):
    names = [artifact.name for artifact in forward_artifacts(make_model(), steps=(4, 2, 4))]
    assert names == ["forward_4_steps.jaxexport", "forward_2_steps.jaxexport"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_chosen_one(dtype, make_model, make_config, tokens):
    other = "bfloat16" if dtype == "float32" else "float32"
    model = make_model(dtype=other)
    artifact = first(model) if dtype == "float32" else first(model, dtype=dtype)
    config = make_config(dtype=dtype)
    same = in_compute_dtypes(with_parameters(abstract_like(model, config), parameters(model)))
    # What is rounded to 16 bits is the same in both programs, but for sums that lie at the edge of two of its values.
    close = SUMS if dtype == "float32" else dict(rtol=0, atol=2e-2)
    np.testing.assert_allclose(called(artifact, tokens), compiled(same)(tokens, steps=2), **close)
    assert np.abs(called(artifact, tokens) - compiled(model)(tokens, steps=2)).max() > 1e-4, "16 bits are seen"


def test_attention_is_xlas_whatever_the_model_takes(make_model, tokens):
    model = make_model(attention="splash")
    with pytest.raises(odelm.InputError, match="splash"):
        model(tokens)
    np.testing.assert_allclose(called(first(model), tokens), compiled(make_model())(tokens, steps=2), **SUMS)


def test_lengths_end_where_the_model_does(make_model):
    artifact = first(make_model())
    assert called(artifact, np.zeros((1, 16), np.int32)).shape == (1, 16, 13)
    with pytest.raises(ValueError):
        called(artifact, np.zeros((1, 17), np.int32))


def test_a_token_without_an_embedding_makes_its_row_nan(make_model):
    logits = called(first(make_model()), np.array([[1, 13, 2], [1, 12, 2]], np.int32))
    assert np.isnan(logits[0, 1:]).all() and np.isfinite(logits[1]).all()


def test_a_jax_without_other_platforms_exports_for_its_own(make_model, tokens, monkeypatch):
    lower = jax_export.export

    def alone(function, *, platforms=None):
        if platforms:
            raise NotImplementedError("no rule for the platform tpu")
        return lower(function)

    monkeypatch.setattr(export.export, "export", alone)
    artifact = first(make_model())
    assert artifact.about["platforms"] == ["cpu"]
    np.testing.assert_allclose(called(artifact, tokens), compiled(make_model())(tokens, steps=2), **SUMS)


def test_float16_from_a_gpu_is_not_for_cpus(make_model, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert first(make_model(), dtype="float16").about["platforms"] == ["cuda", "tpu"]
    assert first(make_model(), dtype="bfloat16").about["platforms"] == ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(solver="kvaerno3", integrator="diffrax"), "'kvaerno3' with integrator 'diffrax' cannot be exported"),
        (dict(solver="kvaerno3"), "'kvaerno3' with integrator 'scan' cannot be exported.*one of euler, midpoint"),
        (
            dict(integrator="diffrax"),
            "'euler' with integrator 'diffrax' cannot.*give the integrator 'scan'",
        ),
        (dict(solver="eulr"), "solver is 'eulr'; did you mean 'euler'"),
        (dict(steps=[3]), "steps is 3, which does not spread evenly over the model's 2 groups"),
        (dict(steps=[], grids=[[0, 3, 4]]), "grid"),
        (dict(dtype="float8"), "model.dtype is 'float8'"),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(options, words, make_model):
    with pytest.raises(odelm.InputError, match=words):
        forward_artifacts(make_model(groups=2), **(dict(steps=[2]) | options))


def test_one_that_is_too_large_is_refused(make_model, monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 10_000)
    with pytest.raises(odelm.InputError, match="but jax.export writes at most 10,000: give --dtype=bfloat16"):
        first(make_model())

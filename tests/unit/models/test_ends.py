"""Prelude and coda: blocks of their own around the shared core, and how the depth is counted with them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import interop
from odelm.config import InitConfig, from_json, to_json
from odelm.errors import InputError
from odelm.models import Inputs
from odelm.models.initialize import branch_scale
from odelm.models.parameters import parameters
from tests.calls import compiled, jitted
from tests.thorough import few, thorough

# A model of six blocks chains about 150 float32 sums of up to 24 terms; states are of order 3.
ATOL = 3 * 300 * 6e-8
ENDS = dict(depth=6, prelude=1, coda=1)


@pytest.mark.parametrize("options", [dict(), dict(groups=2, norm_placement="post"), dict(prelude=2, depth=5, coda=0)])
def test_the_model_is_its_blocks_in_turn(make_model, tokens, options):
    model = make_model(**(ENDS | options))
    config = model.config

    def in_turn(model):
        h = model.embed(Inputs(tokens))
        for block in model.prelude:
            h = block(h)
        for t in range(config.core):
            h = model.blocks[t * config.groups // config.core](h, t)
        for block in model.coda:
            h = block(h)
        return h if model.final_norm is None else model.final_norm(h)

    np.testing.assert_allclose(compiled(model.encode)(tokens), jitted(in_turn, model), rtol=0, atol=ATOL)
    assert len(model.prelude) == config.prelude and len(model.coda) == config.coda


def test_steps_and_grids_speak_of_the_core_and_evaluations_of_all(make_model, tokens):
    model = make_model(**ENDS)
    assert model.config.core == 4
    plan = compiled(model.plan)(steps=2)
    assert sum(part.evaluations for part in plan) == 4
    np.testing.assert_array_equal(compiled(model)(tokens, steps=2), compiled(model)(tokens, grid=[0, 2, 4]))
    with pytest.raises(InputError, match=r"grid\[2\] is 6, expected 4, where depth time ends"):
        model(tokens, grid=[0, 2, 6])
    hidden, evaluations = compiled(model.encode_adaptive)(tokens, tolerance=1.0)
    assert hidden.shape == (2, 6, 16) and int(evaluations) >= 2 + 3


def test_time_runs_through_prelude_core_and_coda(make_model):
    """The features of time are those of the unit of depth: equal weights are modulated alike at equal units."""
    model, plain = make_model(**ENDS), make_model(depth=6)
    for block, t, unit in ((model.prelude[0], 0, 0), (model.blocks[0], 1.5, 2.5), (model.coda[0], 0, 5)):
        own, shared = block.modulation, nnx.clone(plain.blocks[0].modulation)
        nnx.update(shared, nnx.state(own))
        np.testing.assert_allclose(own(jnp.float32(t)), shared(jnp.float32(unit)), rtol=0, atol=1e-6)


@pytest.mark.thorough
def test_every_parameter_of_the_ends_has_an_effect(make_model, tokens):
    graph, params = nnx.split(make_model(**ENDS, bias=True, layer_rank=2, dropout=0.1))
    assert not any("residual" in name for name in parameters(nnx.merge(graph, params)) if name.startswith("prelude"))
    key = jax.random.key(0)
    loss = lambda p: jnp.square(nnx.merge(graph, p)(tokens, steps=4, key=key)).mean()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    silent = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert not silent, silent


def test_dropout_of_a_model_without_ends_is_what_it_was(make_model):
    """The groups draw the first keys, whatever stands around them."""
    fields = make_model(dropout=0.1, groups=2)._fields(key=jax.random.key(3))
    for number, field in enumerate(fields):
        assert jnp.array_equal(
            jax.random.key_data(field.key), jax.random.key_data(jax.random.fold_in(jax.random.key(3), number))
        )
    fields = make_model(dropout=0.1, **ENDS)._fields(key=jax.random.key(3))
    assert len({tuple(jax.random.key_data(field.key).tolist()) for field in fields}) == 3


def test_branches_start_small_enough_for_increments_that_add_up(make_config):
    assert branch_scale(make_config(depth=4)) == pytest.approx(1 / (math.sqrt(2) * 4))
    # Two independent increments, and four coherent ones: 2 + 4 ** 2.
    assert branch_scale(make_config(**ENDS)) == pytest.approx(1 / math.sqrt(2 * (2 + 16)))
    # Where the core shares nothing, prelude and coda are layers like all others.
    assert branch_scale(make_config(**ENDS, groups=4)) == pytest.approx(branch_scale(make_config(depth=6, groups=6)))


@pytest.mark.parametrize("kind", few(["decoder", "encoder"], "decoder"))
def test_unrolled_it_is_an_ordinary_stack_of_the_same_function(make_model, tokens, kind):
    model = make_model(kind=kind, **ENDS, groups=2)
    plain = interop.unrolled(model)
    assert (plain.config.groups, plain.config.prelude, plain.config.coda) == (6, 0, 0)
    np.testing.assert_allclose(compiled(plain)(tokens), compiled(model)(tokens), rtol=0, atol=2 * ATOL)


@pytest.mark.parametrize("merge", few(["mean", "layer", "low_rank"], "mean"))
def test_a_stack_keeps_its_first_and_last_layers(make_model, tokens, merge):
    source = make_model(depth=6, groups=6, time_modulation=False, norm="layernorm", bias=True, qk_norm=False)
    init = InitConfig(from_pretrained="x", groups=2, prelude=1, coda=1, merge=merge, rank=16).validate()
    model = interop.shared(source, init, rngs=nnx.Rngs(0))
    assert (model.config.prelude, model.config.coda, model.config.groups, model.config.core) == (1, 1, 2, 4)
    own, given = parameters(model), parameters(source)
    for name in ("attention/qkv/kernel", "feedforward/down/bias", "norm1/scale"):
        np.testing.assert_array_equal(own[f"prelude/0/{name}"], given[f"blocks/0/{name}"])
        np.testing.assert_array_equal(own[f"coda/0/{name}"], given[f"blocks/5/{name}"])
        pair = np.stack([given[f"blocks/{unit}/{name}"] for unit in (3, 4)])
        expected = pair[0] if merge == "layer" else pair.mean(0)
        np.testing.assert_allclose(own[f"blocks/1/{name}"], expected, rtol=0, atol=1e-6)
    if merge == "low_rank":
        # Residuals of full rank give every layer back.
        np.testing.assert_allclose(compiled(model)(tokens), compiled(source)(tokens), rtol=0, atol=20 * ATOL)
    assert "between 1 and 1 of their own" in interop.summary(source.config, model, init)
    assert np.isfinite(compiled(model)(tokens, steps=2)).all()


def test_sharing_again_keeps_the_ends_unless_told(make_model):
    source = make_model(**ENDS, groups=4)
    kept = interop.shared(source, InitConfig(from_pretrained="x", groups=2), rngs=nnx.Rngs(0))
    assert (kept.config.prelude, kept.config.coda, kept.config.groups) == (1, 1, 2)
    given_up = InitConfig(from_pretrained="x", groups=3, prelude=0, coda=0)
    merged = interop.shared(source, given_up, rngs=nnx.Rngs(0))
    assert (merged.config.prelude, merged.config.coda, merged.config.groups) == (0, 0, 3)
    with pytest.raises(InputError, match="init.groups is 4, but the model has only 2 groups"):
        coarse = make_model(**ENDS, groups=2, time_modulation=False)
        interop.shared(coarse, InitConfig(from_pretrained="x", groups=4), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("options", "model_type"),
    [
        (dict(kind="decoder", norm="layernorm", positions="learned", qk_norm=False), "gpt2"),
        thorough(dict(kind="encoder", norm="layernorm", norm_placement="post", embed_norm=True, positions="learned",
                      qk_norm=False, bias=True, activation="gelu"), "bert"),
        (dict(kind="encoder", norm="layernorm", norm_placement="post", embed_norm=True, positions="learned",
              qk_norm=False, bias=True, embed_dim=8), "albert"),
    ],
)  # fmt: skip
def test_exported_it_comes_back_as_prelude_core_and_coda_layers(make_model, tokens, tmp_path, options, model_type):
    model = make_model(**ENDS, **options)
    interop.export(model, tmp_path / "folder")
    back, config, _ = odelm.load(tmp_path / "folder")
    assert f'"model_type": "{model_type}"' in (tmp_path / "folder" / "config.json").read_text()
    assert (config.model.depth, config.model.groups, config.model.ends) == (6, 6, 0)
    np.testing.assert_allclose(compiled(back)(tokens), compiled(model)(tokens), rtol=0, atol=2 * ATOL)


def test_a_config_with_ends_goes_through_json(make_config):
    config = odelm.Config(model=make_config(**ENDS))
    assert from_json(to_json(dataclasses.replace(
        config, step_sampling=odelm.StepSamplingConfig(counts=()), train=odelm.TrainConfig(length=16)
    ))).model == config.model  # fmt: skip

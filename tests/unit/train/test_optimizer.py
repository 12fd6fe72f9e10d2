"""The learning rate against its closed form, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import odelm
from odelm.config import OptimizerConfig
from odelm.models.parameters import name_of
from odelm.train.optimizer import decayed, make_optimizer, muon_dimensions, schedule

PEAK, FINAL, WARMUP, UPDATES = 3e-3, 0.1, 4, 20


def expected(decay: str, update: int, from_zero: bool) -> float:
    if update < WARMUP:
        return PEAK * update / WARMUP if from_zero else PEAK * (update + 1) / (WARMUP + 1)
    done = (update - WARMUP) / (UPDATES - WARMUP)
    share = {"cosine": (1 + np.cos(np.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[decay]
    return PEAK * (share if decay == "constant" else FINAL + (1 - FINAL) * share)


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_schedule_is_its_closed_form(decay, from_zero):
    config = OptimizerConfig(
        learning_rate=PEAK, warmup=WARMUP, decay=decay, final_fraction=FINAL, warmup_from_zero=from_zero
    )
    rate = schedule(config, UPDATES)
    for update in (0, 1, WARMUP, WARMUP + 1, 11, UPDATES):
        # float32 of numbers of size PEAK, with a cosine: a few roundings.
        assert float(rate(update)) == pytest.approx(expected(decay, update, from_zero), rel=1e-5, abs=1e-9)


def test_warmup_longer_than_the_run_rises_to_its_end():
    rate = schedule(OptimizerConfig(learning_rate=PEAK, warmup=100), 10)
    assert float(rate(5)) == pytest.approx(PEAK * 6 / 11)


def test_every_update_has_a_rate():
    for decay in ("cosine", "linear", "constant"):
        for warmup in (0, 1, 3, 100):
            rate = schedule(OptimizerConfig(warmup=warmup, decay=decay, final_fraction=0.0), 10)
            assert min(float(rate(update)) for update in range(10)) > 0


def test_no_warmup_starts_at_the_peak():
    assert float(schedule(OptimizerConfig(learning_rate=PEAK, warmup=0), 10)(0)) == pytest.approx(PEAK)


def first_update(optimizer, gradients, params):
    """Returns what the optimizer, new, adds to the parameters."""
    return jax.jit(lambda given, params: optimizer.update(given, optimizer.init(params), params)[0])(gradients, params)


def test_only_matrices_decay(make_config):
    model = odelm.create(make_config(bias=True, norm="layernorm"), rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    config = OptimizerConfig(learning_rate=0.1, warmup=0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10, model.config)
    zeros = jax.tree.map(np.zeros_like, params)
    updates = first_update(optimizer, zeros, params)
    moved = jax.tree_util.tree_leaves_with_path(updates)
    names = {jax.tree_util.keystr(path): np.asarray(update) for path, update in moved}
    assert sum("bias" in name for name in names) > 0 and sum("scale" in name for name in names) > 0
    for (path, param), (name, update) in zip(jax.tree_util.tree_leaves_with_path(params), names.items(), strict=True):
        vector = "bias" in name or "scale" in name
        assert jax.tree_util.keystr(path) == name
        wanted = np.zeros_like(param) if vector else -0.1 * 0.5 * np.asarray(param)
        np.testing.assert_allclose(update, wanted, rtol=1e-5, err_msg=name)
    assert any(jax.tree.leaves(decayed(params))) and not all(jax.tree.leaves(decayed(params)))


def test_the_weights_of_lanes_do_not_decay(make_config):
    params = nnx.state(odelm.create(make_config(lanes=2), rngs=nnx.Rngs(0)), nnx.Param)
    names = {name_of(path): kept for path, kept in jax.tree_util.tree_leaves_with_path(decayed(params))}
    assert not names["blocks/0/weights"] and names["blocks/0/inner/attention/out/kernel"]


def test_a_stable_rate_falls_in_the_last_share_of_the_updates():
    config = OptimizerConfig(learning_rate=PEAK, warmup=WARMUP, decay="stable", decay_share=0.25, final_fraction=FINAL)
    rate = schedule(config, UPDATES)
    assert [float(rate(update)) for update in (WARMUP, 10, 15)] == pytest.approx([PEAK] * 3)
    assert float(rate(17)) == pytest.approx(PEAK * (1 - 0.9 * 2 / 5)) and float(rate(20)) == pytest.approx(PEAK * FINAL)
    longer = schedule(config, 2 * UPDATES)
    assert [float(longer(update)) for update in range(15)] == [float(rate(update)) for update in range(15)]


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_muon_trains_the_matrices_of_blocks_and_adamw_all_else(make_config, kv_heads):
    """Muon's changes have singular values near the rate times the factor of the shape, whatever the gradient."""
    model = odelm.create(make_config(prelude=1, bias=True, layer_rank=2, kv_heads=kv_heads), rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    config = OptimizerConfig(kind="muon", learning_rate=0.1, muon_learning_rate=0.5, warmup=0, weight_decay=0.0)
    optimizer = make_optimizer(config, 10, model.config)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: 1e-3 * rng.standard_normal(p.shape).astype(np.float32), params)
    updates = first_update(optimizer, gradients, params)
    moved = {name_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)}
    matrices = {name for name in moved if name.endswith("kernel") and "modulation" not in name}
    assert {name for name in moved if muon_dimensions(name) is not None} == matrices
    assert len(matrices) == (10 if kv_heads else 8)
    D, F = 16, 24
    for name in matrices:
        # (matrices, inputs, outputs)
        several = {"qkv": (D, 3, D), "key_value": (D, 2, D // 2)}
        single = {"query": (1, D, D), "out": (1, D, D), "up": (1, D, F), "down": (1, F, D)}
        part = name.split("/")[-2]
        stacked = moved[name].reshape((several | single)[part])
        stacked = stacked.swapaxes(0, 1) if part in several else stacked
        sizes = np.linalg.svd(stacked, compute_uv=False) / (0.5 * np.sqrt(max(1, stacked.shape[2] / stacked.shape[1])))
        # Five iterations leave singular values between 0.7 and 1.2 (Jordan et al. 2024), those that are not tiny.
        assert np.median(sizes) == pytest.approx(1, abs=0.25) and sizes.max() < 1.3, name
    adam = {name: leaf for name, leaf in moved.items() if name not in matrices}
    # The first step of AdamW is the rate in each coordinate.
    for name, leaf in adam.items():
        assert np.median(np.abs(leaf)) == pytest.approx(0.1, rel=1e-2) and np.abs(leaf).max() < 0.101, name


def test_adamw_keeps_the_state_that_optax_gives_it(make_config):
    """Checkpoints hold it: those of earlier versions must fit."""
    config = make_config()
    params = nnx.state(odelm.create(config, rngs=nnx.Rngs(0)), nnx.Param)
    given = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.1), mask=decayed))
    own = make_optimizer(OptimizerConfig(), 10, config).init(params)
    assert jax.tree.structure(own) == jax.tree.structure(given.init(params))


def test_rates_at_a_reference_width(make_config):
    """The first step of AdamW is the rate in each coordinate: here that of each kind of parameter."""
    options = dict(width=64, reference_width=16, positions="learned", bias=True)
    params = nnx.state(odelm.create(make_config(**options), rngs=nnx.Rngs(0)), nnx.Param)
    config = OptimizerConfig(learning_rate=0.1, warmup=0, weight_decay=0.0)
    optimizer = make_optimizer(config, 10, make_config(**options))
    updates = first_update(optimizer, jax.tree.map(jnp.ones_like, params), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = name_of(path)
        matrix = name.endswith("kernel") and "modulation" not in name
        power = -1 if matrix else -0.5 if name in ("embed/tokens", "embed/learned") else 0
        np.testing.assert_allclose(leaf, -0.1 * 4.0**power, rtol=1e-3, err_msg=name)

"""The learning rate against its closed form, and what decays."""

import jax
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm.config import OptimizerConfig
from odelm.train.optimizer import decayed, make_optimizer, schedule

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


def test_only_matrices_decay(make_config):
    model = odelm.create(make_config(bias=True, norm="layernorm"), rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    config = OptimizerConfig(learning_rate=0.1, warmup=0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = jax.tree_util.tree_leaves_with_path(updates)
    names = {jax.tree_util.keystr(path): np.asarray(update) for path, update in moved}
    assert sum("bias" in name for name in names) > 0 and sum("scale" in name for name in names) > 0
    for (path, param), (name, update) in zip(jax.tree_util.tree_leaves_with_path(params), names.items(), strict=True):
        vector = "bias" in name or "scale" in name
        assert jax.tree_util.keystr(path) == name
        wanted = np.zeros_like(param) if vector else -0.1 * 0.5 * np.asarray(param)
        np.testing.assert_allclose(update, wanted, rtol=1e-5, err_msg=name)
    assert any(jax.tree.leaves(decayed(params))) and not all(jax.tree.leaves(decayed(params)))

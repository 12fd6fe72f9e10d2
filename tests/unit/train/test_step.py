"""One update: its numbers, how often it is traced, and that devices share it without changing it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from odelm import sharding
from odelm.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from odelm.train.optimizer import make_optimizer
from odelm.train.step import compile_updates, graph_of, init_state, make_update

ROOT = Path(__file__).parents[3]
SHAPE = dict(vocab_size=64, width=32, heads=2, depth=4, max_length=16, dtype="float32")
ENCODER = dict(
    kind="encoder", norm="layernorm", norm_placement="post", positions="learned", bias=True, embed_dim=16,
    token_types=2, sentence_order=True, qk_norm=False,
)  # fmt: skip
GRID = np.array([0, 2, 4], np.float32)


def config_of(devices: int = 1, **model) -> Config:
    return Config(
        model=ModelConfig(**SHAPE, **model),
        optimizer=OptimizerConfig(warmup=0),
        train=TrainConfig(batch_size=4, length=16, unroll=False),
        mesh=MeshConfig(data=devices),
    )


def batch_of(config: Config) -> dict[str, np.ndarray]:
    """Four rows of a fixed congruence, the last one half padding."""
    text = (np.arange(4 * 17) * 29 % 61).astype(np.int32).reshape(4, 17)
    weights = np.ones((4, 16), np.float32)
    weights[3, 8:] = 0
    if config.model.kind == "decoder":
        return {"tokens": text[:, :-1].copy(), "targets": text[:, 1:].copy(), "weights": weights}
    positions = np.tile(np.array([2, 5, 9], np.int32), (4, 1))
    return {
        "tokens": text[:, :-1].copy(),
        "mask": weights.astype(bool),
        "token_types": np.tile(np.repeat(np.arange(2, dtype=np.int32), 8), (4, 1)),
        "positions": positions,
        "targets": np.take_along_axis(text, positions, 1),
        "weights": np.take_along_axis(weights, positions, 1),
        "order": np.array([0, 1, 1, 0], np.int32),
        "order_weights": np.ones(4, np.float32),
    }


def updated(config: Config, counts: tuple[int, ...] = (2,)):
    """Returns the state after one update and its metrics."""
    mesh = sharding.make_mesh(config.mesh)
    graph, _ = graph_of(config)
    optimizer = make_optimizer(config.optimizer, 10)
    state = init_state(config, optimizer, mesh)
    batch = sharding.place_batch(batch_of(config), mesh)
    update = make_update(config, graph, optimizer)
    compiled = compile_updates(update, state, batch, counts, mesh, lambda _: None)
    return compiled[2](state, batch, GRID)


GOLDEN = {"decoder": (4.808885, 7.716795), "encoder": (4.887887, 10.520278)}
"""Loss in nats a token and norm of the gradient, at the first update."""


@pytest.fixture(scope="module")
def first_updates():
    return {"decoder": updated(config_of()), "encoder": updated(config_of(**ENCODER))}


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_first_update_is_golden(kind, first_updates):
    state, metrics = first_updates[kind]
    assert int(state.step) == 1
    got = float(metrics["loss"]), float(metrics["gradient_norm"])
    # float32 on another processor or compiler moves the fifth digit; anything more is another model.
    np.testing.assert_allclose(
        got, GOLDEN[kind], rtol=2e-4,
        err_msg="the first update changed: if initialisation, the model, the loss or the random streams were meant to "
        "change, write the new numbers here and say so in the change's description; if not, something broke",
    )  # fmt: skip


def test_one_trace_for_each_step_count():
    config = config_of()
    mesh = sharding.make_mesh(config.mesh)
    graph, _ = graph_of(config)
    optimizer = make_optimizer(config.optimizer, 10)
    state = init_state(config, optimizer, mesh)
    batch = sharding.place_batch(batch_of(config), mesh)
    update, traced = make_update(config, graph, optimizer), []

    def counted(state, batch, grid):
        traced.append(len(grid) - 1)
        return update(state, batch, grid)

    compiled = compile_updates(counted, state, batch, (2, 4), mesh, lambda _: None)
    for steps, grid in ((2, GRID), (4, np.arange(5, dtype=np.float32)), (2, np.array([0, 1, 4], np.float32))):
        state, _ = compiled[steps](state, batch, grid)
    assert traced == [2, 4] and int(state.step) == 3


def test_four_devices_take_the_update_of_one(first_updates, tmp_path):
    code = (
        "import jax, numpy as np\n"
        "from tests.unit.train.test_step import config_of, updated\n"
        "assert jax.device_count() == 4\n"
        "state, metrics = updated(config_of(4))\n"
        f"np.savez({str(tmp_path / 'four.npz')!r}, metrics['loss'], metrics['gradient_norm'],"
        " *jax.tree.leaves((state.params, state.optimizer)))\n"
    )
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    state, metrics = first_updates["decoder"]
    one = [metrics["loss"], metrics["gradient_norm"], *jax.tree.leaves((state.params, state.optimizer))]
    four = np.load(tmp_path / "four.npz")
    assert len(one) == len(four.files)
    # Sums over the batch in another order, in float32. The first AdamW update divides a gradient by its size,
    # which turns the rounding of a gradient near zero into a part of the learning rate, 3e-3.
    for name, single in zip(four.files, one, strict=True):
        np.testing.assert_allclose(four[name], single, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable"])
def test_remat_changes_memory_and_not_the_update(policy):
    config = config_of()
    plain, metrics = updated(config)
    saving = dataclasses.replace(config, train=dataclasses.replace(config.train, remat=policy))
    state, same = updated(saving)
    assert float(same["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert float(same["gradient_norm"]) == pytest.approx(float(metrics["gradient_norm"]), rel=1e-5)
    for left, right in zip(jax.tree.leaves(plain.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)

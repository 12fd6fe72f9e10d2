"""One update: its numbers, how often it is traced, and that devices share it without changing it."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.extend.core
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from odelm import sharding
from odelm.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    StepSamplingConfig,
    TrainConfig,
)
from odelm.models.arrays import pick
from odelm.models.loss import inputs_of, loss_sums
from odelm.train import log, run
from odelm.train.optimizer import make_optimizer
from odelm.train.step import compile_updates, graph_of, init_state, make_update
from tests.thorough import few, thorough

ROOT = Path(__file__).parents[3]
SHAPE = dict(vocab_size=64, width=32, heads=2, depth=4, max_length=16, dtype="float32")
ENCODER = dict(
    kind="encoder", norm="layernorm", norm_placement="post", positions="learned", bias=True, embed_dim=16,
    token_types=2, sentence_order=True, qk_norm=False,
)  # fmt: skip
GRID = np.array([0, 2, 4], np.float32)


def config_of(mesh: tuple[int, int, int] = (1, 1, 1), **model) -> Config:
    return Config(
        model=ModelConfig(**SHAPE, **model),
        optimizer=OptimizerConfig(warmup=0),
        train=TrainConfig(batch_size=4, length=16, unroll=False),
        mesh=MeshConfig(*mesh),
    )


def batch_of(config: Config) -> dict[str, np.ndarray]:
    """Four rows of a fixed congruence, the last one half padding."""
    text = (np.arange(4 * 17) * 29 % 61).astype(np.int32).reshape(4, 17)
    weights = np.ones((4, 16), np.float32)
    weights[3, 8:] = 0
    if config.model.kind == "decoder":
        return {"tokens": text[:, :-1].copy(), "targets": text[:, 1:].copy(), "weights": weights}
    if config.model.outputs:
        classes, real = np.array([[0], [2], [1], [2]], np.int32), np.array([[1], [1], [1], [0]], np.float32)
        return {"tokens": text[:, :-1].copy(), "mask": weights.astype(bool), "targets": classes, "weights": real}
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


def prepared(config: Config):
    """Returns what one update needs: the function, the state and the batch it is called with, and the mesh."""
    mesh = sharding.make_mesh(config.mesh)
    graph, _ = graph_of(config)
    optimizer = make_optimizer(config.optimizer, 10, config.model)
    state = init_state(config, optimizer, mesh)
    batch = sharding.place_batch(batch_of(config), mesh)
    return make_update(config, graph, optimizer), state, batch, mesh


def updated(config: Config, counts: tuple[int, ...] = (2,)):
    """Returns the state after one update and its metrics."""
    update, state, batch, mesh = prepared(config)
    return compile_updates(update, state, batch, counts, mesh, lambda _: None)[2](state, batch, GRID)


def on_devices(count: int, code: str) -> None:
    """Runs a program in a process of its own that has so many devices."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}",
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def with_train(config: Config, **options) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **options))


GOLDEN = {"decoder": (4.808885, 7.716795), "encoder": (4.887887, 10.520278)}
"""Loss in nats a token and norm of the gradient, at the first update."""


@pytest.fixture(scope="module")
def first_update():
    """Returns a function that gives the state after one update on one device, and its metrics, by case."""
    return functools.cache(lambda case: updated(CASES[case]((1, 1, 1))))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_first_update_is_golden(kind, first_update):
    state, metrics = first_update(kind)
    assert int(state.step) == 1
    got = float(metrics["loss"]), float(metrics["gradient_norm"])
    # float32 on another processor or compiler moves the fifth digit; anything more is another model.
    np.testing.assert_allclose(
        got, GOLDEN[kind], rtol=2e-4,
        err_msg="the first update changed: if initialisation, the model, the loss or the random streams were meant to "
        "change, write the new numbers here and say so in the change's description; if not, something broke",
    )  # fmt: skip


def test_an_update_gives_up_the_memory_of_the_state_before_it():
    update, state, batch, mesh = prepared(config_of())
    compiled = compile_updates(update, state, batch, (2,), mesh, lambda _: None)
    after, _ = compiled[2](state, batch, GRID)
    kept = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(state) if not leaf.is_deleted()]
    assert not kept, f"these leaves of the state were not donated: {kept}"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, batch)))


@pytest.fixture
def traces():
    """Counts how often each function is traced while the test runs: a list of names, an entry a trace."""
    names: list[str] = []

    def listen(event: str, duration: float, **about) -> None:
        if event == "/jax/core/compile/jaxpr_trace_duration":
            names.append(str(about.get("fun_name", "")).rpartition(".")[2])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_training_traces_once_for_each_step_count(traces, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(f"word{(7 * i + 3 * k) % 41}" for k in range(60)))
    config = Config(
        model=ModelConfig(**SHAPE | dict(vocab_size=280)),
        data=DataConfig(
            corpus="text", source=str(tmp_path / "texts"), data_dir=str(tmp_path / "data"), valid_fraction=0.2
        ),
        step_sampling=StepSamplingConfig(counts=(4, 2), jitter=0.5),
        optimizer=OptimizerConfig(warmup=2),
        train=TrainConfig(
            updates=6, batch_size=4, length=16, unroll=False, log_every=1, checkpoint_every=1, eval_every=2,
            eval_batches=2, eval_steps=(2, 1),
        ),
    )  # fmt: skip
    original = log.Log.evaluation

    def evaluation(*arguments, **options) -> None:
        original(*arguments, **options)
        traces.append("-- evaluated")

    monkeypatch.setattr(log.Log, "evaluation", evaluation)
    result = run.train(config, tmp_path / "run")
    assert result.step == 6 and set(result.losses) == {4, 2, 1}
    # Six updates of two step counts, and three evaluations at three.
    assert (traces.count("update"), traces.count("loss")) == (2, 3), traces
    # By the first evaluation everything that the loop does was done once.
    assert traces[traces.index("-- evaluated") :] == ["-- evaluated"] * 3, "traced again"


CASES = {
    "decoder": lambda mesh: config_of(mesh),
    "encoder": lambda mesh: config_of(mesh, **ENCODER),
    "lanes and a teacher": lambda mesh: with_train(
        config_of(mesh, lanes=2, wide_modulation=True), distill=0.5, distill_from=0.0
    ),
    "classifier": lambda mesh: config_of(mesh, **ENCODER | dict(sentence_order=False, outputs=3)),
}
MESHES = [(2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (2, 2, 1), (4, 1, 2), (1, 4, 2), (2, 2, 2), (1, 2, 2)]
"""Of eight devices, by data, fsdp and tensor."""
SOME = [(2, 2, 1), (4, 1, 2), (1, 4, 2)]
"""Of these, for the cases that have the decoder's or the encoder's parameters, and few more."""
FEW = [("encoder", (2, 2, 2))]
EVERY = [(case, mesh) for case in CASES for mesh in (MESHES if case in ("decoder", "encoder") else SOME)]
ALL = {case: [pair for pair in EVERY if pair[0] == case and pair not in FEW] for case in CASES}


@pytest.mark.parametrize("pairs", few({"few": FEW} | ALL, "few"))
def test_a_mesh_takes_the_update_of_one_device(first_update, tmp_path, pairs):
    """One program takes all the updates: it is seconds before a program has its devices."""
    code = (
        "import jax, numpy as np\n"
        "from tests.unit.train.test_step import CASES, updated\n"
        "assert jax.device_count() == 8\n"
        f"for number, (case, mesh) in enumerate({pairs!r}):\n"
        "    state, metrics = updated(CASES[case](mesh))\n"
        "    held = jax.tree.leaves(state.params)\n"
        "    cut = sum(x.addressable_shards[0].data.size for x in held) / sum(x.size for x in held)\n"
        f"    np.savez({str(tmp_path)!r} + f'/{{number}}.npz', cut, metrics['loss'], metrics['gradient_norm'],"
        " *jax.tree.leaves((state.params, state.optimizer)))\n"
    )
    on_devices(8, code)
    for number, (case, mesh) in enumerate(pairs):
        state, metrics = first_update(case)
        one = [metrics["loss"], metrics["gradient_norm"], *jax.tree.leaves((state.params, state.optimizer))]
        cut, *several = np.load(tmp_path / f"{number}.npz").values()
        # Most of the parameters are in matrices, each cut along both axes or one of them.
        _, fsdp, tensor = mesh
        assert cut == 1 if fsdp * tensor == 1 else cut < 0.6 + 0.5 / (fsdp * tensor), (case, mesh)
        # Sums over the batch in another order, in float32. The first AdamW update divides a gradient by its size,
        # which turns the rounding of a gradient near zero into a part of the learning rate, 3e-3.
        for shared, single in zip(several, one, strict=True):
            np.testing.assert_allclose(shared, single, rtol=1e-4, atol=3e-4, err_msg=f"{case} {mesh}")


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[str]:
    """Yields the name of every equation of a jaxpr, those of the jaxprs inside it too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def checkpoints(config: Config) -> int:
    update, state, batch, _ = prepared(config)
    names = list(equations(jax.make_jaxpr(update)(state, batch, GRID).jaxpr))
    return sum(name in ("checkpoint", "remat", "remat2") for name in names)


def test_only_remat_computes_products_again():
    def products(remat: str | None) -> int:
        update, state, batch, _ = prepared(with_train(config_of(), remat=remat))
        return sum(name == "dot_general" for name in equations(jax.make_jaxpr(update)(state, batch, GRID).jaxpr))

    assert products("nothing_saveable") > products(None) == products("dots_saveable")


@pytest.mark.parametrize("policy", few(["nothing_saveable", "dots_saveable"], "nothing_saveable"))
def test_remat_does_not_change_the_update(policy, first_update):
    plain, metrics = first_update("decoder")
    state, same = updated(with_train(config_of(), remat=policy))
    assert float(same["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert float(same["gradient_norm"]) == pytest.approx(float(metrics["gradient_norm"]), rel=1e-5)
    for left, right in zip(jax.tree.leaves(plain.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)


@pytest.mark.parametrize(("unroll", "loops"), [(True, 0), (False, 2)])
def test_an_unrolled_update_has_no_loop_over_the_depth(unroll, loops):
    update, state, batch, _ = prepared(with_train(config_of(), unroll=unroll))
    # A scan unrolled to the end stays one in the jaxpr; what is compiled holds a loop forward and one back, or none.
    assert jax.jit(update).lower(state, batch, GRID).as_text().count("stablehlo.while") == loops


@pytest.mark.parametrize("model", [{}, thorough(ENCODER)], ids=["decoder", "encoder"])
def test_a_batch_in_parts_gives_the_same_update(model):
    """Rows predict unequal numbers of tokens, so a mean of the parts' means would be another gradient."""
    config = config_of(**model)
    update, state, batch, _ = prepared(config)
    weights = np.array(batch["weights"])
    weights[0, 1:], weights[2] = 0, 0
    batch = dict(batch) | {"weights": jnp.asarray(weights)}
    whole, metrics = jax.jit(update)(state, batch, GRID)
    in_parts, *_ = prepared(with_train(config, accumulate=4))
    parts, same = jax.jit(in_parts)(state, batch, GRID)
    for name in metrics:
        # float32 sums in another order.
        assert float(same[name]) == pytest.approx(float(metrics[name]), rel=1e-4), name
    for left, right in zip(jax.tree.leaves(whole.optimizer), jax.tree.leaves(parts.optimizer), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-6)


def test_z_loss_is_minimised_and_not_reported(first_update):
    _, metrics = first_update("decoder")
    _, other = updated(with_train(config_of(), z_loss=1.0))
    assert float(other["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert float(other["gradient_norm"]) != pytest.approx(float(metrics["gradient_norm"]), rel=1e-2)


@pytest.mark.parametrize("kind", few(["decoder", "encoder"]))
def test_few_steps_learn_from_full_depth_once_it_is_time(kind, first_update):
    """The objective is made again from the model's logits; before its time the update is the plain one."""
    config = with_train(CASES[kind]((1, 1, 1)), distill=0.75, distill_from=0.5, updates=10)
    update, state, batch, _ = prepared(config)
    _, without = first_update(kind)
    graph, _ = graph_of(config)

    def objective(params):
        student, teacher = nnx.merge(graph, params), nnx.merge(graph, state.params)
        inputs = inputs_of(batch)
        sums = loss_sums(student, batch, plan=student.plan(grid=GRID))
        states, aims = student.run(inputs, student.plan(grid=GRID))[0], teacher.run(inputs, teacher.plan())[0]
        if "positions" in batch:
            states, aims = pick(states, batch["positions"]), pick(aims, batch["positions"])
        cross = optax.softmax_cross_entropy(student.readout(states), jax.nn.softmax(teacher.readout(aims)))
        taught = (cross * batch["weights"]).sum() / batch["weights"].sum()
        return 0.25 * sums.loss + 0.75 * taught + sums.objective - sums.loss

    late = dataclasses.replace(state, step=jnp.int32(5))
    wanted = float(optax.tree.norm(jax.jit(jax.grad(objective))(state.params)))
    update = jax.jit(update)
    before, late = (update(each, batch, GRID)[1] for each in (state, late))
    assert float(late["gradient_norm"]) == pytest.approx(wanted, rel=1e-4)
    assert float(late["gradient_norm"]) != pytest.approx(float(without["gradient_norm"]), rel=1e-2)
    for name in without:
        assert float(before[name]) == pytest.approx(float(without[name]), rel=1e-5), name
    assert float(late["loss"]) == pytest.approx(float(without["loss"]), rel=1e-6)


def test_full_depth_has_no_teacher():
    config = with_train(config_of(), distill=0.75, distill_from=0.0)
    update, state, batch, _ = prepared(config)
    names = list(equations(jax.make_jaxpr(update)(state, batch, np.arange(5, dtype=np.float32)).jaxpr))
    assert "cond" not in names
    assert "cond" in list(equations(jax.make_jaxpr(update)(state, batch, GRID).jaxpr))


def test_the_mean_of_parameters_is_their_running_mean():
    config = config_of()
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, average=0.5))
    update, state, batch, _ = prepared(config)
    assert state.evaluated is state.average
    after, _ = jax.jit(update)(state, batch, GRID)
    # After one update the decay is the smaller of 0.5 and (1 + 1) / (10 + 1).
    for old, new, mean in zip(*(jax.tree.leaves(t) for t in (state.params, after.params, after.average)), strict=True):
        np.testing.assert_allclose(mean, 2 / 11 * old + 9 / 11 * new, rtol=1e-5, atol=1e-7)


def test_an_update_that_is_not_finite_changes_nothing_but_the_step():
    update, state, batch, _ = prepared(config_of())
    poisoned = dict(batch) | {"weights": batch["weights"] * jnp.nan}
    after, metrics = jax.jit(update)(state, poisoned, GRID)
    assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (1, 1, 1)
    kept = [(state.params, state.optimizer), (after.params, after.optimizer)]
    for old, new in zip(*map(jax.tree.leaves, kept), strict=True):
        np.testing.assert_array_equal(old, new)
    again, _ = jax.jit(update)(after, batch, GRID)
    assert int(again.skipped) == 0 and int(again.step) == 2

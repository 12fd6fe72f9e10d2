"""What another model teaches, which is larger or smaller and stays as it is."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import odelm
from odelm import bundle
from odelm.config import Config, DataConfig, StepSamplingConfig, TrainConfig
from odelm.models import Classifier
from odelm.models.arrays import pick
from odelm.models.loss import inputs_of, loss_sums
from odelm.train.run import train
from odelm.train.teacher import FrozenModel
from tests.thorough import thorough
from tests.unit.train.test_step import CASES, ENCODER, GRID, config_of, on_devices, prepared, with_train

FULL = np.arange(5, dtype=np.float32)
LARGER = dict(width=48, heads=4, groups=4, time_modulation=False)


def teacher_of(config: Config, **other) -> FrozenModel:
    """Returns a teacher of another shape; its layers have blocks of their own."""
    model = odelm.create(dataclasses.replace(config.model, **LARGER | other), rngs=nnx.Rngs(7))
    graph, params = nnx.split(model, nnx.Param)
    rng = np.random.default_rng(0)
    return FrozenModel(jax.tree.map(lambda p: p + 0.2 * rng.standard_normal(p.shape, np.float32), params), graph)


def taught(config: Config, grid, teacher: FrozenModel):
    """Returns the metrics of one update, and the state after it."""
    update, state, batch, _ = prepared(config)
    after, metrics = jax.jit(update)(dataclasses.replace(state, teacher=teacher), batch, grid)
    return metrics, after, state, batch


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_what_is_minimised_is_made_of_the_teachers_predictions(kind):
    config = with_train(CASES[kind]((1, 1, 1)), distill=0.75, distill_from=0.0)
    teacher = teacher_of(config)
    metrics, after, state, batch = taught(config, FULL, teacher)

    def objective(params):
        student, other = nnx.merge(nnx.graphdef(odelm.create(config.model, rngs=nnx.Rngs(0))), params), teacher.model
        inputs, plan = inputs_of(batch), student.plan(grid=FULL)
        sums = loss_sums(student, batch, plan=plan)
        states, aims = student.run(inputs, plan)[0], other.run(inputs, other.plan())[0]
        if "positions" in batch:
            states, aims = pick(states, batch["positions"]), pick(aims, batch["positions"])
        cross = optax.softmax_cross_entropy(student.readout(states), jax.nn.softmax(other.readout(aims)))
        learned = (cross * batch["weights"]).sum() / batch["weights"].sum()
        return 0.25 * sums.loss + 0.75 * learned + sums.objective - sums.loss

    wanted = float(optax.tree.norm(jax.jit(jax.grad(objective))(state.params)))
    assert float(metrics["gradient_norm"]) == pytest.approx(wanted, rel=1e-4)
    for old, new in zip(jax.tree.leaves(teacher.params), jax.tree.leaves(after.teacher.params), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_model_that_is_its_own_teacher_learns_as_from_its_full_depth():
    config = with_train(config_of(), distill=0.75, distill_from=0.0)
    update, state, batch, _ = prepared(config)
    own = jax.jit(update)(state, batch, GRID)[1]
    graph = nnx.graphdef(odelm.create(config.model, rngs=nnx.Rngs(0)))
    other = taught(config, GRID, FrozenModel(jax.tree.map(jnp.copy, state.params), graph))[0]
    for name in own:
        assert float(other[name]) == pytest.approx(float(own[name]), rel=1e-5), name


@pytest.mark.parametrize("mesh", [thorough((2, 1, 1)), thorough((1, 2, 2))])
def test_a_mesh_has_the_teacher_too(mesh, tmp_path):
    code = (
        "import jax, numpy as np\n"
        "from odelm import sharding\n"
        "from tests.unit.train.test_step import *\n"
        "from tests.unit.train.test_teacher import *\n"
        f"config = with_train(config_of({mesh!r}), distill=0.75, distill_from=0.0)\n"
        "update, state, batch, mesh = prepared(config)\n"
        "teacher = teacher_of(config)\n"
        "teacher = jax.device_put(teacher, sharding.state_shardings(teacher, mesh))\n"
        "state = dataclasses.replace(state, teacher=teacher)\n"
        "(update,) = compile_updates(update, state, batch, (2,), mesh, print).values()\n"
        f"np.save({str(tmp_path / 'found.npy')!r}, update(state, batch, GRID)[1]['gradient_norm'])\n"
    )
    on_devices(mesh[0] * mesh[1] * mesh[2], code)
    config = with_train(config_of(), distill=0.75, distill_from=0.0)
    metrics = taught(config, GRID, teacher_of(config))[0]
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), metrics["gradient_norm"], rtol=1e-4)


@pytest.fixture(scope="module")
def small(tmp_path_factory, corpus) -> Config:
    """Returns the config of a short run on a small corpus."""
    data = DataConfig(corpus="text", source=str(corpus), data_dir=str(tmp_path_factory.mktemp("data")), vocab_size=300)
    config = dataclasses.replace(config_of(), model=dataclasses.replace(config_of().model, vocab_size=300))
    config = with_train(config, updates=4, eval_every=4, eval_batches=1, checkpoint_every=2, distill=0.5)
    # One count, to compile one update.
    config = with_train(config, eval_steps=(4,))
    return dataclasses.replace(config, data=data, step_sampling=StepSamplingConfig(kind="fixed"))


@pytest.mark.thorough
def test_a_run_learns_from_a_run_and_resumes_to_the_bit(small, tmp_path):
    first = with_train(dataclasses.replace(small, model=dataclasses.replace(small.model, width=48)), distill=0.0)
    train(first, tmp_path / "teacher")
    config = with_train(small, distill_from=0.0, teacher=str(tmp_path / "teacher"))
    whole = train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parted")
    shutil.rmtree(tmp_path / "parted" / "checkpoints" / "4")
    assert train(config, tmp_path / "parted").losses == whole.losses
    model, loaded, _ = odelm.load(tmp_path / "whole")
    assert loaded.train.teacher and model.config.width == 32
    alone = train(with_train(config, teacher="", distill=0.0), tmp_path / "alone")
    assert alone.losses != whole.losses


def test_a_teacher_that_cannot_teach_is_refused(small, tmp_path):
    def refused(config: Config, match: str) -> None:
        with pytest.raises(odelm.InputError, match=match):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run" / "config.json").exists()

    refused(with_train(small, teacher="x", distill=0.0), "train.distill is 0, which learns nothing of it")
    refused(with_train(small, teacher=str(tmp_path / "none")), "none")
    refused(with_train(small, teacher="small-decoder"), "has other tokens than the run")
    refused(with_train(small, teacher="small-encoder"), "is no decoder with the head of a language model")
    classifier = Classifier(dataclasses.replace(small.model, **ENCODER), outputs=2, rngs=nnx.Rngs(0))
    bundle.write(tmp_path / "classifier", classifier, Config(train=TrainConfig(length=16)))
    masked = dataclasses.replace(small, model=dataclasses.replace(small.model, **ENCODER))
    refused(with_train(masked, teacher=str(tmp_path / "classifier")), "is no encoder with the head of a language model")
    _, _, tokenizer = odelm.load("small-decoder")
    model = odelm.create(dataclasses.replace(small.model, max_length=8, vocab_size=8192), rngs=nnx.Rngs(0))
    bundle.write(tmp_path / "b", model, Config(train=TrainConfig(length=8)), tokenizer=tokenizer)
    path = str(odelm.shipped.FOLDER / "small-decoder" / "tokenizer.json")
    other = dataclasses.replace(
        small,
        data=dataclasses.replace(small.data, tokenizer=path, vocab_size=None),
        model=dataclasses.replace(small.model, vocab_size=8192),
    )
    refused(with_train(other, teacher=str(tmp_path / "b")), "has 8 positions, but train.length is 16")
    task = dataclasses.replace(
        small, data=DataConfig(task="rte", source="glue"), model=dataclasses.replace(small.model, **ENCODER)
    )
    refused(with_train(task, teacher="small-encoder"), "train.teacher teaches language models")

"""What is saved comes back to the bit, and what cannot be loaded says why in one line."""

import dataclasses
import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models

import odelm
from odelm import checkpoint, checkpoint_files, config, manifest, run_directory
from odelm.checkpoint import Checkpoints
from odelm.config import replace
from odelm.errors import RunFailure

OPTIMIZER = {"count": jnp.int32(3), "mean": jnp.arange(4.0)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_config):
    """A run directory with checkpoints 3 and 5, and the parameters at step 5."""
    workdir = tmp_path_factory.mktemp("run")
    config = odelm.Config(model=make_config(), train=odelm.TrainConfig(length=16))
    params = nnx.state(odelm.create(config.model, rngs=nnx.Rngs(0)), nnx.Param)
    later = jax.tree.map(lambda p: p + 1, params)
    run_directory.save_config(workdir, config)
    (workdir / run_directory.TOKENIZER).write_text(Tokenizer(models.BPE()).to_str())
    checkpoints = Checkpoints(workdir, retention=odelm.TrainConfig(keep=2))
    checkpoints.save(3, params, OPTIMIZER)
    checkpoints.save(5, later, OPTIMIZER, {"note": [1.5, None]})
    checkpoints.save(5, params, OPTIMIZER)
    checkpoints.close()
    return workdir, config, params, later


def assert_same(left, right) -> None:
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


def test_load_returns_the_newest_step_and_a_saved_step_is_not_overwritten(saved):
    workdir, config, params, later = saved
    model, loaded, _ = odelm.load(workdir)
    assert loaded == config
    assert_same(nnx.state(model, nnx.Param), later)
    assert_same(nnx.state(odelm.load(workdir, step=3)[0], nnx.Param), params)


def test_restore_returns_parameters_and_optimizer(saved):
    workdir, _, params, later = saved
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore_newest(params, OPTIMIZER)
    checkpoints.close()
    assert (restored.step, restored.meta) == (5, {"step": 5, "sealed": 1, "note": [1.5, None]})
    assert_same((restored.params, restored.optimizer), (later, OPTIMIZER))


def test_loading_leaves_an_unfinished_checkpoint_to_the_run_that_writes_it(saved):
    workdir = saved[0]
    unfinished = workdir / run_directory.CHECKPOINTS / "7.orbax-checkpoint-tmp-0"
    unfinished.mkdir()
    odelm.load(workdir)
    assert unfinished.is_dir()
    unfinished.rmdir()


def truncate(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_arrays(folder: Path) -> None:
    for part in list(folder.rglob("d")):
        truncate(part)


def remove_arrays(folder: Path) -> None:
    for part in list(folder.rglob("d")):
        shutil.rmtree(part)


DAMAGES = [
    truncate,
    truncate_arrays,
    remove_arrays,
    lambda folder: (folder / "manifest.ocdbt").unlink(),
    lambda folder: (folder / "_METADATA").write_text("{}"),
    shutil.rmtree,
]


def message_of(caught) -> str:
    """Returns the message of an InputError, which has to be a line that can be read."""
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parameters_are_told_and_the_checkpoint_before_is_taken(saved, tmp_path, damage, capsys):
    run = shutil.copytree(saved[0], tmp_path / "run")
    damage(run / run_directory.CHECKPOINTS / "5" / "params")
    with pytest.raises(odelm.InputError) as caught:
        odelm.load(run, step=5)
    message = message_of(caught)
    assert message.startswith(f"checkpoint 5 of {run} cannot be read: ") and "params/" in message
    assert message.endswith(f"; remove {run / run_directory.CHECKPOINTS / '5'} to resume from step 3")
    capsys.readouterr()
    assert_same(nnx.state(odelm.load(run)[0], nnx.Param), saved[2])
    told = capsys.readouterr().err
    assert told.startswith(f"checkpoint 5 of {run} is damaged, ") and told.endswith(": takes step 3\n")
    assert (run / run_directory.CHECKPOINTS / "5").is_dir()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_optimizers_stop_a_run_that_would_resume(saved, tmp_path, damage):
    run = shutil.copytree(saved[0], tmp_path / "run")
    for step in ("3", "5"):
        damage(run / run_directory.CHECKPOINTS / step / "optimizer")
    checkpoints = Checkpoints(run)
    with pytest.raises(odelm.InputError) as caught:
        checkpoints.restore_newest(saved[2], OPTIMIZER)
    checkpoints.close()
    message = message_of(caught)
    assert message.startswith(f"checkpoint 5 of {run} cannot be read: ") and "the others are damaged too" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(feedforward=32), r"blocks/0/feedforward/down/kernel is \(24, 16\), but config.json gives \(32, 16\)"),
        (dict(tie_readout=False), r"head/tokens is absent, but config.json gives \(13, 16\)"),
        (dict(qk_norm=False), r"key_norm/scale is \(8,\), but config.json gives absent"),
    ],
)
def test_a_config_that_does_not_fit_is_told(saved, tmp_path, make_config, options, words):
    run = shutil.copytree(saved[0], tmp_path / "run")
    run_directory.save_config(run, dataclasses.replace(saved[1], model=make_config(**options)))
    with pytest.raises(odelm.InputError, match=words) as caught:
        odelm.load(run)
    assert message_of(caught).startswith(f"checkpoint 5 of {run} does not fit: ")


def test_missing_step_is_told(saved):
    with pytest.raises(odelm.InputError, match=r"no checkpoint 4 of .*\(the newest is 5\); .* 3, 5"):
        odelm.load(saved[0], step=4)


def test_what_is_missing_is_named(saved, tmp_path):
    workdir, config, _, _ = saved
    with pytest.raises(odelm.InputError, match="not a directory"):
        odelm.load(tmp_path / "absent")
    with pytest.raises(odelm.InputError, match="no config.json"):
        odelm.load(tmp_path)
    run_directory.save_config(tmp_path, config)
    with pytest.raises(odelm.InputError, match="no tokenizer.json"):
        odelm.load(tmp_path)
    (tmp_path / run_directory.TOKENIZER).write_bytes((workdir / run_directory.TOKENIZER).read_bytes())
    with pytest.raises(odelm.InputError, match="no checkpoints"):
        odelm.load(tmp_path)
    (tmp_path / run_directory.CHECKPOINTS).mkdir(exist_ok=True)
    with pytest.raises(odelm.InputError, match="no finished checkpoint"):
        odelm.load(tmp_path)


def test_damaged_files_are_named(saved, tmp_path):
    workdir, config, _, _ = saved
    (tmp_path / run_directory.CONFIG).write_bytes(b"\xff\xfe{}")
    with pytest.raises(odelm.InputError, match="config.json is not UTF-8"):
        odelm.load(tmp_path)
    run_directory.save_config(tmp_path, config)
    (tmp_path / run_directory.TOKENIZER).write_text((workdir / run_directory.TOKENIZER).read_text()[:40])
    with pytest.raises(odelm.InputError, match="tokenizer.json is not a tokenizer.json"):
        odelm.load(tmp_path)


def test_differences_names_what_changed():
    given = odelm.Config()
    given = replace(given, {"model.width": 64, "train.updates": 7})
    assert config.changed_options(odelm.Config(), given, frozenset({"train.updates"})) == ["model.width: 128 -> 64"]


def flip(path: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def cut(path: Path, rng: np.random.Generator) -> None:
    # Without its last byte, a line feed, a manifest is still whole.
    length = path.stat().st_size - (path.name == manifest.MANIFEST)
    path.write_bytes(path.read_bytes()[: rng.integers(length)])


def remove(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


HARMS = {"flip": flip, "cut": cut, "remove": remove}


def files_of(run: Path, step: int) -> list[Path]:
    return sorted(p for p in (run / run_directory.CHECKPOINTS / str(step)).rglob("*") if p.is_file())


def save_averaged(run: Path) -> list[Path]:
    """Saves steps 3 and 5 with means of parameters, and returns the files of step 5, of every kind that there is."""
    checkpoints = Checkpoints(run)
    for step in (3, 5):
        checkpoints.save(step, {"a": jnp.full(4, step)}, OPTIMIZER, average={"a": jnp.full(4, step / 2)})
    checkpoints.close()
    files = files_of(run, 5)
    parts = {path.relative_to(run / run_directory.CHECKPOINTS / "5").parts[0] for path in files}
    assert parts >= {"params", "optimizer", checkpoint.AVERAGE, "meta", manifest.MANIFEST}
    return files


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_every_kind_of_damage_in_every_file_is_found(tmp_path, harm, capsys):
    """Three bits are flipped in each file, one after the other, each is cut to three lengths, and each is removed.

    tests/kills/test_damage.py resumes from such checkpoints.
    """
    rng, files = np.random.default_rng(0), save_averaged(tmp_path)
    for path in files * (1 if harm is remove else 3):
        whole = path.read_bytes()
        harm(path, rng)
        assert checkpoint_files.newest_whole(tmp_path) == 3, path
        told = capsys.readouterr().err
        # A checkpoint without its manifest is one whose save was interrupted, of which nothing is said.
        if harm is not remove or path.name != manifest.MANIFEST:
            assert "checkpoint 5" in told and "step 3" in told and ("checksum" in told or "missing" in told), told
            assert path.name in told or path.name == manifest.MANIFEST, told
        path.write_bytes(whole)
        assert checkpoint_files.newest_whole(tmp_path) == 5


def test_the_newest_whole_step_is_found_without_loading(saved, tmp_path, capsys):
    run = shutil.copytree(saved[0], tmp_path / "run")
    assert checkpoint_files.newest_whole(run) == 5
    flip(files_of(run, 5)[3], np.random.default_rng(2))
    assert checkpoint_files.newest_whole(run) == 3
    assert "checkpoint 5" in capsys.readouterr().err
    flip(files_of(run, 3)[3], np.random.default_rng(2))
    with pytest.raises(odelm.InputError, match="checkpoint 5 .* cannot be read"):
        checkpoint_files.newest_whole(run)


@pytest.mark.thorough
def test_a_model_is_loaded_over_several_devices(saved, tmp_path):
    code = (
        "import jax, numpy as np, odelm\n"
        "from odelm.sharding import make_mesh\n"
        "from odelm.config import MeshConfig\n"
        "from flax import nnx\n"
        "from tests.calls import compiled\n"
        f"path, tokens = {str(saved[0])!r}, np.arange(8)[None] % 13\n"
        "config, mesh = odelm.load(path)[1], make_mesh(MeshConfig(data=1, fsdp=2, tensor=1))\n"
        "whole, cut = odelm.load(path)[0], odelm.load(path, mesh=mesh)[0]\n"
        "sizes = [sum(s.data.size for s in x.addressable_shards) for x in jax.tree.leaves(nnx.state(cut, nnx.Param))]\n"
        "one = [x.addressable_shards[0].data.size for x in jax.tree.leaves(nnx.state(cut, nnx.Param))]\n"
        "assert sum(one) < 0.7 * sum(x.size for x in jax.tree.leaves(nnx.state(whole, nnx.Param)))\n"
        "for steps in (4, 2):\n"
        "    found, expected = (compiled(model)(tokens, steps=steps) for model in (cut, whole))\n"
        "    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)\n"
    )
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    }
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_where_all_are_damaged_the_newest_is_told(saved, tmp_path):
    run = shutil.copytree(saved[0], tmp_path / "run")
    for step in (3, 5):
        flip(files_of(run, step)[0], np.random.default_rng(1))
    with pytest.raises(odelm.InputError, match="checkpoint 5 of .* cannot be read: the checksum of .* is wrong"):
        odelm.load(run)


def test_a_save_that_was_interrupted_before_its_manifest_does_not_count(saved, tmp_path):
    run = shutil.copytree(saved[0], tmp_path / "run")
    (run / run_directory.CHECKPOINTS / "5" / manifest.MANIFEST).unlink()
    assert_same(nnx.state(odelm.load(run)[0], nnx.Param), saved[2])
    with pytest.raises(odelm.InputError, match=r"no checkpoint 5 of .*\(the newest is 3\)"):
        odelm.load(run, step=5)


def test_an_interrupted_save_does_not_stand_in_the_way_of_an_earlier_step(saved, tmp_path):
    """A run that resumes from before it may be stopped, and save, before it gets there again."""
    run = shutil.copytree(saved[0], tmp_path / "run")
    (run / run_directory.CHECKPOINTS / "5" / manifest.MANIFEST).unlink()
    checkpoints = Checkpoints(run)
    assert checkpoints.restore_newest(saved[2], OPTIMIZER).step == 3
    checkpoints.save(4, saved[3], OPTIMIZER)
    checkpoints.save(5, saved[3], OPTIMIZER)
    checkpoints.close()
    assert Checkpoints(run, read_only=True).steps() == [3, 4, 5]
    assert (run / run_directory.DAMAGED / "5").is_dir()


def test_a_manifest_is_what_sha256sum_reads(saved):
    folder = saved[0] / run_directory.CHECKPOINTS / "5"
    lines = (folder / manifest.MANIFEST).read_text().splitlines()
    assert len(lines) == len(files_of(saved[0], 5)) - 1
    for digest, name in (line.split("  ") for line in lines):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(keep=1), [6]),
        (dict(keep=2), [5, 6]),
        (dict(keep=1, keep_every=3), [3, 6]),
        (dict(keep=1, keep_best=2), [2, 4, 6]),
        (dict(keep=1, keep_minutes=1e9), [1, 6]),
    ],
)
def test_checkpoints_are_kept_by_number_step_loss_and_time(tmp_path, options, kept):
    losses = {1: 5.0, 2: 3.0, 4: 2.0, 5: 4.0}
    checkpoints = Checkpoints(tmp_path, retention=odelm.TrainConfig(**options))
    for step in range(1, 7):
        # Full depth comes first; others may have more steps than it.
        loss = {"eval_loss": {"4": losses[step], "8": -step, "2": -step}} if step in losses else {}
        checkpoints.save(step, {"a": jnp.ones(2)}, {"b": jnp.ones(2)}, loss)
    checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).steps() == kept
    assert sorted(path.name for path in (tmp_path / run_directory.CHECKPOINTS).iterdir()) == sorted(map(str, kept))


def test_a_full_disk_keeps_the_last_good_step(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    checkpoints.wait()

    def full(directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        checkpoints.save(2, {"a": jnp.ones(2)}, {"b": jnp.ones(2)})
        with pytest.raises(
            RunFailure, match="checkpoint 2 .* cannot be written .*No space left.* good checkpoint is 1"
        ):
            checkpoints.wait()
    checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).steps() == [1]


def test_too_little_memory_to_restore_is_no_damage(tmp_path, monkeypatch):
    state = {"a": jnp.ones(2)}, {"b": jnp.ones(2)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, *state)
    checkpoints.wait()

    def full(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1024 bytes.")

    monkeypatch.setattr(checkpoints._manager, "restore", full)
    with pytest.raises(RuntimeError, match="Out of memory"):
        checkpoints.restore_newest(*state)
    monkeypatch.undo()
    restored = checkpoints.restore_newest(*state)
    assert restored is not None and restored.step == 1
    checkpoints.close()

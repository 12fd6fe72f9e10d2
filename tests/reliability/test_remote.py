"""A run at a URL: what is lost here comes back from there, to the bit, and nothing there is taken that is not whole."""

import dataclasses
import shutil
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import manifest, remote
from odelm.config import replace
from odelm.errors import InputError, RunFailure
from odelm.train.run import train

pytestmark = pytest.mark.usefixtures("traced_once")
UPDATES = 6


@pytest.fixture
def config(corpus, tmp_path) -> odelm.Config:
    return odelm.Config(
        model=odelm.ModelConfig(vocab_size=300, width=32, heads=2, depth=4, max_length=32),
        data=odelm.DataConfig(
            corpus="text", source=str(corpus), data_dir=str(tmp_path / "data"), valid_fraction=0.1
        ),
        step_sampling=odelm.StepSamplingConfig(counts=(2,)),
        optimizer=odelm.OptimizerConfig(decay="constant", warmup=0),
        train=odelm.TrainConfig(
            updates=UPDATES, batch_size=4, length=16, eval_batches=1, eval_every=100, eval_steps=(2,),
            checkpoint_every=2, log_every=1, keep=2, unroll=False,
        ),
    )  # fmt: skip


@pytest.fixture
def system():
    """Returns fsspec's file system in memory, with nothing in it afterwards."""
    found = fsspec.filesystem("memory")
    yield found
    found.store.clear()
    found.pseudo_dirs[:] = [""]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Returns where this machine keeps the runs of URLs."""
    monkeypatch.setattr(remote, "CACHE", str(tmp_path / "here"))
    return tmp_path / "here"


URL = "memory://bucket/runs/a"


def files_of(system) -> set[str]:
    return {name.removeprefix("/bucket/runs/a/") for name in system.find("/bucket/runs/a")}


def steps_of(system) -> set[int]:
    return {int(name.split("/")[1]) for name in files_of(system) if name.endswith(manifest.MANIFEST)}


def parameters_of(path) -> list[np.ndarray]:
    model, _, _ = odelm.load(path)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def test_what_is_lost_here_comes_back_to_the_bit(config, system, here, tmp_path, capsys):
    whole = train(config, tmp_path / "whole")
    assert train(replace(config, {"train.updates": 4}), URL).step == 4
    assert steps_of(system) == {2, 4}
    assert {"config.json", "tokenizer.json", "tokens.sha256", "metrics.jsonl"} <= files_of(system)
    assert any(name.startswith("tensorboard/") for name in files_of(system))

    shutil.rmtree(here)
    again = train(config, URL)
    assert again.step == UPDATES and again.losses == whole.losses
    told = capsys.readouterr().out
    assert f"fetched checkpoint 4 of {URL}" in told and "resumed after update 4" in told
    assert steps_of(system) == {4, 6}, "what is superseded here is removed there"
    for left, right in zip(parameters_of(tmp_path / "whole"), parameters_of(URL), strict=True):
        np.testing.assert_array_equal(left, right)
    metrics = [
        [line for line in path.read_text().splitlines() if '"loss"' in line]
        for path in (tmp_path / "whole" / "metrics.jsonl", next(here.iterdir()) / "metrics.jsonl")
    ]
    assert len(metrics[0]) == len(metrics[1]) == UPDATES


def test_a_checkpoint_that_is_not_whole_there_is_passed_over(config, system, here, capsys):
    train(replace(config, {"train.updates": 4}), URL)
    name = next(name for name in sorted(system.find("/bucket/runs/a/checkpoints/4")) if "/d/" in name)
    content = bytearray(system.cat_file(name))
    content[len(content) // 2] ^= 1
    system.pipe_file(name, bytes(content))
    shutil.rmtree(here)
    assert train(config, URL).step == UPDATES
    told = capsys.readouterr().out
    assert f"checkpoint 4 at {URL} is damaged, the checksum of" in told and "fetched checkpoint 2" in told
    # A checkpoint without its manifest is unfinished.
    system.rm_file("/bucket/runs/a/checkpoints/6/" + manifest.MANIFEST)
    shutil.rmtree(here)
    remote.fetched(URL, print)
    assert "fetched checkpoint 6" not in capsys.readouterr().out


def test_a_copy_that_fails_is_told_and_tried_again(config, system, here, capsys, monkeypatch):
    put, failing = type(system).put_file, [True]

    def put_file(self, path, name, **options):
        if failing[0]:
            raise OSError("the network is down")
        return put(self, path, name, **options)

    monkeypatch.setattr(type(system), "put_file", put_file)
    with pytest.raises(RunFailure, match=f"{URL} cannot be written .the network is down.; the run is whole in {here}"):
        train(config, URL)
    assert "it is tried again with the next checkpoint" in capsys.readouterr().out
    assert not steps_of(system) and odelm.checkpoint.latest_step(remote.local_copy(URL)) == UPDATES
    failing[0] = False
    assert train(config, URL).step == UPDATES
    assert steps_of(system) == {4, 6}


@pytest.mark.thorough
def test_another_run_at_the_url_is_refused(config, system, here):
    train(replace(config, {"train.updates": 2}), URL)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, width=16))
    with pytest.raises(InputError, match="holds a run with other options .*model.width: 32 -> 16"):
        train(other, URL)
    train(other, here.parent / "other")
    shutil.rmtree(remote.local_copy(URL))
    shutil.copytree(here.parent / "other", remote.local_copy(URL))
    with pytest.raises(InputError, match=f"{URL} holds another run than .*model.width: 32 -> 16"):
        train(other, URL)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://nothing/here", "has no config.json, so it is not a run"),
        ("nonsense://bucket/run", "cannot be opened .*nonsense"),
    ],
)
def test_what_is_no_run_is_named(url, words, system):
    with pytest.raises(InputError, match=words):
        odelm.load(url)


@pytest.mark.thorough
def test_a_url_of_the_local_file_system_works_from_the_programs(config, tmp_path, monkeypatch):
    """In processes of their own, each on a machine of its own."""
    from odelm.programs import infer
    from odelm.programs import train as program

    url, options = f"file://{tmp_path}/elsewhere/run", config.train
    given = [f"--config.data.{name}={getattr(config.data, name)}" for name in ("source", "data_dir", "valid_fraction")]
    given += ["--config.data.corpus=text", "--config.model.vocab_size=300", "--config.model.width=32"]
    given += ["--config.model.depth=2", "--config.train.updates=2", "--config.train.eval_batches=1"]
    given += [f"--config.train.length={options.length}", "--config.train.batch_size=4", "--config.train.unroll=false"]
    assert program.main(["--config=tiny", f"--workdir={url}", *given]) == 0
    for machine in ("second", "third"):
        monkeypatch.setattr(remote, "CACHE", str(tmp_path / machine))
        if machine == "second":
            assert program.main([f"--workdir={url}", "--config.train.updates=3"]) == 0
        else:
            assert infer.main([f"--workdir={url}", "--prompt=a", "--new_tokens=2", "--steps=1"]) == 0
    assert (tmp_path / "elsewhere" / "run" / "checkpoints" / "3" / manifest.MANIFEST).is_file()
    assert program.main([f"--workdir=file://{tmp_path}/nothing"]) == 2

"""Runs of several updates on every shape of mesh have the losses of the run on one device."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import odelm
from odelm.checkpoint import Checkpoints
from odelm.train.log import METRICS
from odelm.train.run import train
from tests.kills.test_kills import ROOT

Shape = tuple[int, int, int]
OF_TWO: list[Shape] = [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
OF_EIGHT: list[Shape] = [
    (8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 1, 4), (1, 4, 2), (1, 2, 4), (2, 2, 2),
]  # fmt: skip
"""Devices along data, fsdp and tensor."""
UPDATES = 4

pytestmark = pytest.mark.kills


def config_of(folder: Path, source: Path) -> odelm.Config:
    """Eight heads and eight rows, so that eight devices can share either; dropout, so that random draws count."""
    return odelm.Config(
        model=odelm.ModelConfig(vocab_size=304, width=32, heads=8, depth=2, max_length=16, dropout=0.1),
        data=odelm.DataConfig(corpus="text", source=str(source), data_dir=str(folder / "data"), valid_fraction=0.1),
        step_sampling=odelm.StepSamplingConfig(kind="fixed"),
        optimizer=odelm.OptimizerConfig(warmup=0),
        train=odelm.TrainConfig(
            updates=UPDATES, batch_size=8, length=16, eval_batches=1, eval_steps=(2,), log_every=1, unroll=False
        ),
    )


def train_on(shapes: Sequence[Shape], folder: Path, source: Path) -> None:
    """Trains once on each shape, in a folder named after it that has the metrics and what the run printed."""
    with pytest.MonkeyPatch.context() as patch:
        # Saving takes as long as the updates, and is tested elsewhere.
        patch.setattr(Checkpoints, "save", lambda *_, **__: None)
        for shape in shapes:
            config = dataclasses.replace(config_of(folder, source), mesh=odelm.MeshConfig(*shape))
            workdir, printed = folder / name_of(shape), io.StringIO()
            with contextlib.redirect_stdout(printed):
                train(config, workdir)
            (workdir / "printed").write_text(printed.getvalue())


def name_of(shape: Shape) -> str:
    return "-".join(map(str, shape))


def numbers_of(workdir: Path) -> list[float]:
    """Returns the losses of all updates, the norms of their gradients, and the held-out loss."""
    records = [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]
    losses, norms = ([r[name] for r in records if name in r] for name in ("loss", "gradient_norm"))
    held_out = [loss for r in records for loss in r.get("eval_loss", {}).values()]
    assert (len(losses), len(norms), len(held_out)) == (UPDATES, UPDATES, 1)
    return losses + norms + held_out


def start(devices: int, shapes: Sequence[Shape], folder: Path, source: Path) -> subprocess.Popen[str]:
    """Starts a program with so many devices: it is seconds before one has them, so that it trains on several shapes."""
    code = (
        "import jax\n"
        "from pathlib import Path\n"
        "from tests.kills.test_meshes import train_on\n"
        f"assert jax.device_count() == {devices}\n"
        f"train_on({shapes!r}, Path({str(folder)!r}), Path({str(source)!r}))\n"
    )
    count = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_every_shape_of_mesh_trains_as_one_device_does(corpus, tmp_path):
    train_on([(1, 1, 1)], tmp_path, corpus)
    # Each keeps about one core busy.
    parts = [(2, OF_TWO), (8, OF_EIGHT[::2]), (8, OF_EIGHT[1::2])]
    started = [start(devices, shapes, tmp_path, corpus) for devices, shapes in parts]
    for process in started:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    expected = numbers_of(tmp_path / name_of((1, 1, 1)))
    assert expected[UPDATES - 1] < expected[0], "nothing was learned"
    for shape in OF_TWO + OF_EIGHT:
        workdir = tmp_path / name_of(shape)
        data, fsdp, tensor = shape
        assert f"mesh: data {data}, fsdp {fsdp}, tensor {tensor}\n" in (workdir / "printed").read_text()
        # float32 sums in another order differ by a few units in the last place, 1e-7; four updates add to that.
        np.testing.assert_allclose(numbers_of(workdir), expected, rtol=1e-5, err_msg=f"{shape}")

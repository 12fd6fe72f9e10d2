"""What the tests share: a CPU platform, tiny models, and parameters at which every part of a model matters."""
# ruff: noqa: E402
# What jax and Python read when they start is set before anything is imported.

import gc
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".pytest_cache"

# Before jax is imported, and in the environment, so that the programs that tests start have them too.
# Where Python may not write bytecode beside its sources, every one of them would compile all that it imports, which
# takes twice as long as the rest of its start.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(CACHE / "bytecode"))
    sys.dont_write_bytecode = False
# Compiling takes most of the time of these tests, and the same few shapes come again and again.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Where in Python an operation comes from: found for each one, and of use only to who reads the compiled program.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Users may forbid implicit broadcasting.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Compiling to fast code would take six times as long, and the shapes are tiny. Set XLA_FLAGS, empty or not, to have it.
if os.environ["JAX_PLATFORMS"] == "cpu":
    # XLA ends a process that names a flag which it lacks, as JAX 0.11 does the first of these.
    flags = ["--xla_backend_optimization_level=0"]
    if version("jaxlib").startswith("0.10."):
        flags += [
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
            "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        ]
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filelock import FileLock
from flax import nnx
from hypothesis import settings

import odelm

# Traces are full of cycles that live as long as their caches: looking for dead ones at the usual pace takes a
# twentieth of the time.
gc.set_threshold(50_000, 20, 20)

# The same examples in every run, so that a failure belongs to the change that shows it; a first example may compile.
settings.register_profile("odelm", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("odelm")

TINY = dict(vocab_size=13, width=16, heads=2, depth=4, feedforward=24, max_length=16)


def randomised(module: nnx.Module, *, seed: int = 0, scale: float = 0.1) -> nnx.Module:
    """Returns the module with noise on every parameter: what starts at zero or one (modulation, norms) then counts."""
    graph, params = nnx.split(module)
    rng = np.random.default_rng(seed)
    # By NumPy: JAX would compile a program for each shape.
    noisy = jax.tree.map(
        lambda p: jnp.asarray(np.asarray(p) + np.float32(scale) * rng.standard_normal(p.shape, np.float32)), params
    )
    return nnx.merge(graph, noisy)


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nnx.Module]:
    return randomised


@pytest.fixture(scope="session")
def make_config() -> Callable[..., odelm.ModelConfig]:
    """Returns a function from options to a tiny ModelConfig."""
    return lambda **options: odelm.ModelConfig(**(TINY | options))


@pytest.fixture(scope="session")
def make_model(make_config) -> Callable[..., nnx.Module]:
    """Returns a function from options to a tiny model with noise on all parameters; not to be changed by a test."""
    made = {}

    def make(**options) -> nnx.Module:
        name = tuple(sorted(options.items()))
        if name not in made:
            made[name] = randomised(odelm.create(make_config(**options), rngs=nnx.Rngs(0)))
        return made[name]

    return make


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """int32 (2, 6), different from one position to the next."""
    return np.array([[3, 1, 4, 11, 5, 9], [2, 7, 12, 8, 0, 6]], np.int32)


@pytest.fixture
def x64():
    """Computes in float64, where an error of a method stands clear of rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def traced_once():
    """Lets the runs of a module share what they trace and compile: see tests/traced_once.py."""
    from tests.traced_once import traced_once

    with traced_once():
        yield


@pytest.fixture
def traced_anew():
    """Lets the runs of a test trace all by themselves, also in a module that shares it."""
    from tests.traced_once import traced_once

    with traced_once(False):
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Returns `folder = once(name, fill)`: filled by the first process of pytest-xdist to ask, and found by the others.

    No test may change it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def fill_once(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return fill_once


@pytest.fixture(scope="session")
def corpus(once) -> Path:
    """Returns a folder of sixty text files of sixty words."""

    def write(folder: Path) -> None:
        for i in range(60):
            words = [f"word{(7 * i + 3 * k) % 41} and" for k in range(60)]
            (folder / f"{i}.txt").write_text(" ".join(words))

    return once("texts", write)

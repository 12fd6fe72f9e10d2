"""The kernels are compiled for an H200 by a machine that has none, where JAX's plugin for CUDA is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_cuda12_plugin") is None:
    pytest.skip("jax-cuda12-plugin is not installed (`make test-newest` does)", allow_module_level=True)


CASES = {
    "--model=small-decoder --steps=3": "persistent,launches",
    "--shape=small --steps=12 --parallel --temperature=1 --top_k=40": "persistent",
    '--shape=medium --steps=5 --ends=1 --layout={"marks":false}': "persistent",
}


@pytest.mark.parametrize("options", CASES)
def test_kernels_compile_for_a_card_that_is_not_there(options):
    command = [sys.executable, "-m", "benchmarks.decode_kernel", f"--how={CASES[options]}"]
    command += [*options.split(), "--compile_for=benchmarks/h200.textproto"]
    environment = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for how in CASES[options].split(","):
        assert f"{how}: compiled" in done.stdout

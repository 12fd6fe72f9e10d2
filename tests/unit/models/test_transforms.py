"""The modules run under jax.jit, jax.vmap, jax.pmap, jax.shard_map and nnx.jit, over two devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.thorough import thorough

ROOT = Path(__file__).parents[3]


# A decoder by every transformation, and an encoder by two.
@pytest.mark.parametrize("calls", ["most", thorough("all")])
def test_every_transformation_gives_the_same(calls):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "tests/unit/models/transforms.py", calls],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("all agree\n"), done.stdout + done.stderr

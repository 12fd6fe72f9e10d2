"""Text generated on a mesh of four devices: rows over `data`, heads over `tensor`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.thorough import few

CODE = """
import json, sys
import jax, numpy as np, odelm
from flax import nnx
from odelm.config import MeshConfig
from odelm.infer.sampling import Sampling
from odelm.sharding import make_mesh, state_shardings

shape = dict(vocab_size=64, width=32, heads=4, depth=4, max_length=32, prelude=1, dtype="float32")
graph, params = nnx.split(odelm.create(odelm.ModelConfig(**shape), rngs=nnx.Rngs(0)))
rng = np.random.default_rng(0)
params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape, np.float32), params)
mesh = make_mesh(MeshConfig(data=2, tensor=2))
whole, cut = (nnx.merge(graph, p) for p in (params, jax.device_put(params, state_shardings(params, mesh))))
prompts = [[3, 1, 4], [5], [9, 2, 6, 5], [1, 2]]
options = json.loads(sys.argv[1])
expected = odelm.Generator(whole, **options)(prompts, new_tokens=6)
assert len(set(map(tuple, expected))) > 1
generator = odelm.Generator(cut, **options)
assert generator(prompts, new_tokens=6) == expected
with jax.set_mesh(mesh):
    assert generator(prompts, new_tokens=6) == expected
    assert generator(prompts[:3], new_tokens=6) == expected[:3]  # rows that the devices do not divide
    state = generator.begin(prompts, 6, Sampling(), jax.random.key(0))
keys = state.memory.blocks[0].keys
(shape,) = {shard.data.shape for shard in keys.addressable_shards}
assert (shape[2], shape[4]) == (2, 2), (keys.shape, shape)
"""
OPTIONS = {"steps": dict(steps=2), "drafts": dict(draft_steps=1, draft_length=2)}


@pytest.mark.parametrize("options", few(OPTIONS, "steps"))
def test_a_mesh_shares_out_rows_and_heads(options):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(options)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]

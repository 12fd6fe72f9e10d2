"""Whether a kernel of attention gives on a mesh of four devices what it gives on one."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
from odelm.models.MODULE import NAME
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((4, 128, n, 16)), jnp.float32) for n in HEADS)
segments = jnp.asarray(rng.integers(0, 2, (4, 128)).cumsum(1) // 30, jnp.int32)
def gradient(*parts):
    return jax.grad(lambda *p: jnp.sin(NAME(*p, segments=segments, causal=True)).sum(), (0, 1, 2))(*parts)
alone = jax.jit(gradient)(q, k, v)
mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
with jax.set_mesh(mesh):
    together = jax.jit(gradient)(q, k, v)
assert len(together[0].sharding.device_set) == 4
for left, right in zip(alone, together):
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)
"""


def check(module: str, name: str, heads: tuple[int, int, int]) -> None:
    """Runs a function of a module of `odelm.models`, with so many heads of queries, keys and values."""
    code = PROGRAM.replace("MODULE", module).replace("NAME", name).replace("HEADS", str(heads))
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"XLA_FLAGS": flags}, timeout=300)

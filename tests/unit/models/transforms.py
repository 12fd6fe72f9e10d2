"""Run on two devices by test_transforms.py: the modules under each transformation give what they give without one."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import odelm
from odelm.models import BlockField, Inputs

assert jax.device_count() == 2
TINY = dict(vocab_size=13, width=16, heads=2, depth=4, feedforward=24, max_length=16)
TOKENS = np.arange(24, dtype=np.int32).reshape(4, 6) % 13
MASK = np.arange(6)[None] < np.array([[6], [5], [6], [4]])
BATCH = PartitionSpec("data")
EVERYTHING = "all" in sys.argv

for options in (dict(), dict(kind="encoder", norm_placement="post", positions="learned", depth=6, prelude=1, coda=1)):
    model = odelm.create(odelm.ModelConfig(**(TINY | options)), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    plan = model.plan(steps=2)
    inputs = Inputs(TOKENS, mask=MASK)

    def call(params, plan, inputs, graph=graph):
        model = nnx.merge(graph, params)
        return model.readout(model.run(inputs, plan)[0])

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), inputs)
    found = {
        "vmap": jax.jit(jax.vmap(call, (None, None, 0)))(params, plan, halves).reshape(4, 6, 13),
        "shard_map": jax.jit(
            jax.shard_map(call, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(), BATCH), out_specs=BATCH)
        )(params, plan, inputs),
    }
    expected = jax.jit(call)(params, plan, inputs)
    if EVERYTHING or not options:
        found |= {
            "none": call(params, plan, inputs),
            "nnx.jit": nnx.jit(lambda model, plan, inputs: model.readout(model.run(inputs, plan)[0]))(
                model, plan, inputs
            ),
            "pmap": jax.pmap(call, in_axes=(None, None, 0))(params, plan, halves).reshape(4, 6, 13),
        }
    for name, logits in found.items():
        # The same sums in another order: up to 150 roundings of 6e-8 of logits of order 3.
        np.testing.assert_allclose(logits, expected, rtol=0, atol=3 * 150 * 6e-8, err_msg=name)

    if options and not EVERYTHING:
        continue
    # One block by itself, as another project would use it.
    graph, params = nnx.split(model.blocks[0])
    h = jnp.ones((4, 6, 16))

    def cross(params, h, graph=graph):
        return odelm.integrate(BlockField(nnx.merge(graph, params)), h, [0, 2, 4])

    expected = cross(params, h)
    for name, end in {
        "jit": jax.jit(cross)(params, h),
        "pmap": jax.pmap(cross, in_axes=(None, 0))(params, h.reshape(2, 2, 6, 16)).reshape(h.shape),
        "shard_map": jax.jit(jax.shard_map(cross, mesh=mesh, in_specs=(PartitionSpec(), BATCH), out_specs=BATCH))(
            params, h
        ),
        "nnx.jit": nnx.jit(lambda block, h: odelm.integrate(BlockField(block), h, [0, 2, 4]))(model.blocks[0], h),
    }.items():
        np.testing.assert_allclose(end, expected, rtol=0, atol=3 * 150 * 6e-8, err_msg=f"block, {name}")
print("all agree")

"""Models compute the same where the user of JAX forbids it to choose a shape, a dtype or a layout.

That no shape is chosen (`jax_numpy_rank_promotion="raise"`) is a condition of the whole test suite.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import ode
from odelm.infer.generate import generate
from odelm.infer.generator import Generator
from odelm.infer.runner import Runner
from odelm.models.inputs import Inputs
from odelm.models.loss import loss_sums
from tests.thorough import few

POST = dict(
    kind="encoder", norm="layernorm", norm_placement="post", embed_norm=True, positions="learned", qk_norm=False,
    bias=True, token_types=2, sentence_order=True,
)  # fmt: skip
MODELS = {
    "decoder": dict(),
    "sinusoidal": dict(positions="sinusoidal", parallel_branches=True),
    "encoder": POST,
    "groups": dict(groups=2, layer_rank=2, activation="swiglu"),
    "ends": dict(depth=6, prelude=1, coda=1, embed_dim=8, bias=True),
    "chain": dict(inner_blocks=2, positions="sinusoidal", parallel_branches=True),
    "fewer key-value heads": dict(heads=4, kv_heads=2, layer_rank=2, wide_modulation=True),
}


def test_the_suite_forbids_rank_promotion():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))


def batch_of(model: odelm.CausalLM | odelm.MaskedLM, tokens: np.ndarray) -> dict[str, np.ndarray]:
    rows, length = tokens.shape
    if model.config.kind == "decoder":
        return {"tokens": tokens, "targets": tokens[:, ::-1], "weights": np.ones((rows, length), np.float32)}
    ones = np.ones((rows, 2), np.float32)
    picked = np.tile(np.array([[1, 3]], np.int32), (rows, 1))
    order = {"order": np.arange(rows, dtype=np.int32) % 2, "order_weights": np.ones(rows, np.float32)}
    return {"tokens": tokens, "positions": picked, "targets": tokens[:, :2], "weights": ones} | order


@pytest.mark.parametrize("options", few(MODELS, "sinusoidal", "encoder", "ends", "fewer key-value heads"))
def test_no_dtype_is_promoted(options, make_model, tokens):
    model = make_model(**options)
    mask = np.array([[True] * 6, [True] * 4 + [False] * 2])
    segments = np.array([[0, 0, 1, 1, 1, 2]] * 2, np.int32)
    graph, params = nnx.split(model)

    def everything(params):
        model = nnx.merge(graph, params)
        return [
            model(tokens, mask=mask, segments=segments),
            model(tokens, steps=2, solver="rk4"),
            model.encode(tokens, plan=plan),
            model.encode_adaptive(tokens, tolerance=0.5)[0],
            jax.grad(lambda p: loss_sums(nnx.merge(graph, p), batch_of(model, tokens)).objective)(params),
        ]

    # A promotion is an error where it is traced, and nothing else is changed: there is nothing to compile or compare.
    with jax.numpy_dtype_promotion("strict"):
        plan = model.plan(steps=2, solver="heun", integrator="diffrax")
        found = jax.eval_shape(everything, params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))


def test_a_promotion_is_found_where_it_is_traced():
    with jax.numpy_dtype_promotion("strict"), pytest.raises(jax.dtypes.TypePromotionError):
        jax.eval_shape(lambda x: x + jnp.ones(3, jnp.bfloat16), jnp.ones(3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_dtype_is_promoted_in_16_bits(dtype, make_model, tokens):
    """But in the gradient: there JAX's own attention asks for it (jax.nn.dot_product_attention, JAX 0.11)."""
    for options in (dict(), POST, dict(residual_dtype="float32")):
        graph, params = nnx.split(make_model(**dict(residual_dtype=dtype) | options, dtype=dtype))
        with jax.numpy_dtype_promotion("strict"):
            found = jax.eval_shape(lambda params: nnx.merge(graph, params)(tokens, steps=2), params)  # noqa: B023
        assert found.dtype == jnp.float32


def test_no_dtype_is_promoted_with_a_memory_nor_in_generation(make_model, tokens):
    model = make_model(dtype="bfloat16")
    graph, params = nnx.split(model)

    def in_two_parts(params):
        model = nnx.merge(graph, params)
        plan = model.plan(steps=2)
        memory = model.memory(plan, batch=2, room=6)
        _, memory = model.run(Inputs(tokens=tokens[:, :4]), plan, memory=memory)
        return model.run(Inputs(tokens=tokens[:, 4:]), plan, memory=memory)

    def by_every_solver(h):
        return [ode.integrate(lambda t, h: -h, h, [0, 1, 2], solver=solver) for solver in ode.SOLVERS]

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(in_two_parts, params)
        jax.eval_shape(by_every_solver, jnp.ones(3, jnp.bfloat16))
        runner = Runner.of(model)
        plan = runner.plan(2, "euler")
        generate(runner, [1, 2], plan=plan, new_tokens=2, temperature=0.7)
        options = dict(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
        Generator.of(runner, None, plan)([[1, 2], [3]], new_tokens=3, **options)


MESH = """
import sys, jax, numpy as np, odelm
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from odelm.models import cross_entropy
from odelm.models.loss import loss_sums
from tests.unit.models.test_forbidden_rules import MODELS, batch_of
mesh = jax.make_mesh((2,), ("data",))
assert mesh.axis_types == (AxisType.Explicit,)
cross_entropy.reads_once = lambda: True  # as on a GPU, where it is harder to lay out
tokens = np.arange(24, dtype=np.int32).reshape(4, 6) % 13
mask = np.arange(6)[None] < np.array([[6], [4], [6], [5]])
segments = np.tile(np.array([[0, 0, 1, 1, 1, 2]], np.int32), (4, 1))
tiny = dict(vocab_size=13, width=16, heads=2, depth=4, feedforward=24, max_length=16)
for name in sys.argv[1:]:
    options = tiny | MODELS[name] | dict(dropout=0.1 if name == "groups" else 0.0)
    model = odelm.create(odelm.ModelConfig(**options), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    types = (tokens % 2).astype(np.int32) if options.get("token_types") else None
    key = jax.random.key(1) if options["dropout"] else None

    @jax.jit
    def both(params, tokens, mask, segments, types, batch):
        def objective(params):
            return loss_sums(nnx.merge(graph, params), batch, key=key).objective
        model = nnx.merge(graph, params)
        logits = model(tokens, mask=mask, segments=segments, token_types=types, steps=2, key=key)
        return logits, jax.value_and_grad(objective)(params)

    rows = tokens, mask, segments, types, batch_of(model, tokens)
    expected = both(params, *rows)
    whole = jax.device_put(params, NamedSharding(mesh, P()))
    placed = jax.device_put(rows, NamedSharding(mesh, P("data")))
    # From JAX 0.11 the gradient of a scan over an Explicit mesh needs jax.set_mesh; calls do not.
    with jax.set_mesh(mesh):
        found = both(whole, *placed)
    assert found[0].sharding.spec[0] == "data", found[0].sharding
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5, err_msg=name)
    if name == sys.argv[-1]:
        alone = jax.jit(lambda params, tokens, mask, segments, types: nnx.merge(graph, params)(
            tokens, mask=mask, segments=segments, token_types=types, steps=2, key=key))(whole, *placed[:4])
        np.testing.assert_allclose(alone, found[0], rtol=0, atol=1e-6)
print("equal")
"""


@pytest.mark.thorough
@pytest.mark.parametrize("names", [["encoder"], ["groups", "decoder", "sinusoidal", "fewer key-value heads"]])
def test_a_mesh_of_explicit_axes_computes_what_one_device_does(names):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", MESH, *names], env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=300, cwd=root,
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr

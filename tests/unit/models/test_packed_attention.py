"""Attention within packed documents by Triton's kernel, interpreted, gives what XLA's attention gives with a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from odelm.models import attention
from odelm.models.packed_attention import packed_attention
from tests.thorough import few
from tests.unit.models import on_a_mesh

LENGTH = 128
PACKED = np.repeat(np.array([[0, 1, 1, 2], [0, 0, 3, 3]], np.int32), 32, axis=1)
REAL = np.arange(LENGTH)[None] < np.array([[100], [128]])


@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_are_those_with_a_mask(causal):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, LENGTH, 2, 16)), jnp.float32) for _ in range(3))
    mask = PACKED[:, None, :, None] == PACKED[:, None, None, :]

    def of(attend):
        def objective(*parts):
            values = attend(*parts)
            return jnp.sin(values).sum(), values

        gradients, values = jax.jit(jax.grad(objective, (0, 1, 2), has_aux=True))(q, k, v)
        return values, *gradients

    got = of(lambda *parts: packed_attention(*parts, segments=jnp.asarray(PACKED), causal=causal))
    exact = of(lambda *parts: jax.nn.dot_product_attention(*parts, mask=mask, is_causal=causal))
    for left, right in zip(got, exact, strict=True):
        # float32 sums over 128 keys of terms of order one, in another order.
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)


CALLS = {
    "decoder": (dict(), dict(segments=PACKED)),
    "encoder, padded": (dict(kind="encoder", norm_placement="post"), dict(segments=PACKED, mask=REAL)),
}


@pytest.mark.parametrize("options, call", few(CALLS, "encoder, padded"))
def test_a_model_computes_the_same(options, call, make_config, make_model, monkeypatch):
    model = make_model(max_length=LENGTH, width=32, heads=2, **options)
    tokens = np.random.default_rng(0).integers(0, 13, (2, LENGTH), dtype=np.int32)
    plain = model(tokens, steps=2, **call)
    taken = []

    def takes(implementation, q, k):
        taken.append(q.shape)
        return True

    monkeypatch.setattr(attention, "takes_packed", takes)
    graph, params = nnx.split(model)
    other = nnx.merge(graph, params)(tokens, steps=2, **call)
    assert taken and set(taken) == {(2, LENGTH, 2, 16)}
    real = call.get("mask", np.ones((2, LENGTH), bool))
    np.testing.assert_allclose(np.asarray(other)[real], np.asarray(plain)[real], rtol=0, atol=1e-4)
    taken.clear()
    nnx.merge(graph, params)(tokens, steps=2)
    assert not taken, "one document needs no numbers"


def test_auto_takes_it_on_gpus_where_it_fits(monkeypatch):
    def takes(length=256, size=64, shared=4, implementation="auto", dtype=jnp.bfloat16, rows=2):
        q, k = (jax.ShapeDtypeStruct((rows, length, heads, size), dtype) for heads in (4, shared))
        return attention.takes_packed(implementation, q, k)

    assert not takes()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert takes() and takes(1024) and not takes(2048) and not takes(64) and not takes(200)
    assert not takes(shared=2) and not takes(size=48) and not takes(implementation="cudnn")
    assert not takes(dtype=jnp.float32)
    mesh = jax.sharding.AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        assert takes() and not takes(rows=3)
    for gone in ("jax.experimental.gone", "jax.experimental.gone.attention"):
        monkeypatch.setattr("odelm.models.packed_attention.KERNELS", gone)
        assert not takes()


@pytest.mark.thorough
def test_a_mesh_cuts_rows_and_heads():
    on_a_mesh.check("packed_attention", "packed_attention", (2, 2, 2))

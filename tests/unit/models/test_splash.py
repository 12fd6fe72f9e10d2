"""Splash attention, interpreted, gives what XLA's attention gives, at every place that is no padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm.errors import InputError
from odelm.models import attention
from odelm.models.splash import splash_attention
from tests.calls import compiled
from tests.thorough import few
from tests.unit.models import on_a_mesh

LENGTH = 128
PACKED = np.repeat(np.array([[0, 1, 1, 2], [0, 0, 3, 3]], np.int32), 32, axis=1)
REAL = np.arange(LENGTH)[None] < np.array([[100], [128]])


def drawn(heads: int = 2, shared: int = 2):
    """Returns queries of so many heads, and keys and values of those that they share."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, LENGTH, n, 16)), jnp.float32) for n in (heads, shared, shared)]


CASES = {
    f"{'causal' if causal else 'both ways'}, {name}": (causal, *case)
    for causal in (True, False)
    for name, case in {
        "plain": (None, (2, 2)), "packed": (PACKED, (2, 2)), "packed, two share": (PACKED, (4, 2)),
        "three share": (None, (3, 1)),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize(
    ("causal", "segments", "heads"),
    few(CASES, "causal, packed", "causal, three share", "both ways, plain", "both ways, packed, two share"),
)
def test_values_and_gradients_are_those_of_the_whole_matrix(causal, segments, heads):
    q, k, v = drawn(*heads)
    mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]

    def of(attend):
        def objective(*parts):
            values = attend(*parts)
            return jnp.sin(values).sum(), values

        gradients, values = jax.jit(jax.grad(objective, (0, 1, 2), has_aux=True))(q, k, v)
        return values, *gradients

    given = segments if segments is None else jnp.asarray(segments)
    got = of(lambda *parts: splash_attention(*parts, segments=given, causal=causal))
    exact = of(lambda *parts: jax.nn.dot_product_attention(*parts, mask=mask, is_causal=causal))
    for left, right in zip(got, exact, strict=True):
        # float32 sums over 128 keys of terms of order one, in another order.
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)


CALLS = {
    "decoder, packed": (dict(), dict(segments=PACKED)),
    "encoder, padded": (dict(kind="encoder", norm_placement="post"), dict(mask=REAL)),
    "fewer key-value heads": (dict(heads=4, kv_heads=2), dict(segments=PACKED)),
    "decoder, packed and padded": (dict(positions="learned"), dict(segments=PACKED, mask=REAL)),
}


@pytest.mark.parametrize("options, call", CALLS.values(), ids=CALLS)
def test_a_model_computes_the_same(options, call, make_config, make_model):
    shape = dict(max_length=LENGTH, **options)
    model = make_model(**shape)
    graph, _ = nnx.split(odelm.create(make_config(attention="splash", **shape), rngs=nnx.Rngs(0)))
    splash = nnx.merge(graph, nnx.state(model))
    tokens = np.random.default_rng(0).integers(0, 13, (2, LENGTH), dtype=np.int32)
    plain, other = (jax.jit(lambda m: m(tokens, steps=2, **call))(m) for m in (model, splash))
    real = call.get("mask", np.ones((2, LENGTH), bool))
    np.testing.assert_allclose(np.asarray(other)[real], np.asarray(plain)[real], rtol=0, atol=1e-4)


def test_a_memory_is_read_without_it(make_config):
    model = odelm.create(make_config(max_length=LENGTH, attention="splash"), rngs=nnx.Rngs(0))
    plan, tokens = compiled(model.plan)(steps=1), np.zeros((1, 3), np.int32)
    memory = model.memory(plan, batch=1, room=8)
    hidden, memory = compiled(model.run)(odelm.models.Inputs(tokens), plan, memory=memory)
    assert hidden.shape == (1, 3, 16) and int(memory.length) == 3


def test_a_length_that_it_cannot_compute_is_refused(make_config):
    model = odelm.create(make_config(attention="splash"), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="'splash', but the length is 6: expected a multiple of 128"):
        model(np.zeros((1, 6), np.int32))


def test_auto_takes_it_on_tpus_where_it_fits(monkeypatch):
    def takes(length: int, implementation: str = "auto") -> bool:
        return attention.takes_splash(implementation, jax.ShapeDtypeStruct((1, length, 2, 16), jnp.bfloat16))

    assert not takes(1024) and takes(1024, "splash")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert takes(1024) and not takes(256) and not takes(1000) and not takes(1024, "xla")


@pytest.mark.thorough
@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 2)])
def test_a_mesh_cuts_rows_and_heads(heads):
    on_a_mesh.check("splash", "splash_attention", heads)

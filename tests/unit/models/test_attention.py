"""The implementations of attention agree, and `auto` chooses among them by what they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odelm.errors import InputError
from odelm.models import attention
from odelm.models.arrays import scaled
from odelm.models.attention import attend, choose_implementation, rotate
from odelm.models.inputs import Inputs, within
from odelm.models.view import View, rotary_angles


def drawn(length: int, dtype=jnp.bfloat16, size: int = 64, heads: int = 2, rows: int = 2) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((rows, length, heads, size)), dtype) for _ in range(3)]


def test_auto_takes_cudnn_where_it_pays(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    long, short, odd = (drawn(attention.CUDNN_FROM + more) for more in (0, -2, 1))
    assert choose_implementation("auto", *long[:2]) == "cudnn"
    assert choose_implementation("auto", *short[:2]) == "xla"
    assert choose_implementation("auto", *odd[:2]) == "xla"
    assert choose_implementation("auto", odd[0], long[1]) == "xla"
    assert choose_implementation("auto", *drawn(128, rows=8)[:2]) == "cudnn"
    assert choose_implementation("auto", *drawn(128, rows=7)[:2]) == "xla"
    assert choose_implementation("auto", *drawn(200, rows=6)[:2]) == "cudnn"
    assert choose_implementation("auto", *drawn(126, rows=9)[:2]) == "xla"
    assert choose_implementation("cudnn", *short[:2]) == "cudnn"
    assert choose_implementation("xla", *long[:2]) == "xla"
    assert choose_implementation("auto", *drawn(512, jnp.float32)[:2]) == "xla"
    assert choose_implementation("auto", *drawn(512, size=132)[:2]) == "xla"
    with pytest.raises(InputError, match="model.attention is 'cudnn', but here are float32"):
        choose_implementation("cudnn", *drawn(512, jnp.float32)[:2])


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it is available")
def test_cudnn_is_refused_where_it_is_missing(make_model, tokens):
    with pytest.raises(InputError, match="'cudnn'.*backend 'cpu'.*try 'auto'"):
        make_model(attention="cudnn", dtype="bfloat16")(tokens)
    np.testing.assert_array_equal(make_model(attention="xla")(tokens), make_model(attention="auto")(tokens))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", [None, "mask", "lengths"])
@pytest.mark.parametrize("length", [128, 512])
def test_implementations_agree(causal, padding, length):
    q, k, v = drawn(length)
    lengths = jnp.array([length, length - 9])
    mask = View(real=within(lengths, length)).allowed(length, causal=causal)
    said = {"mask": dict(mask=mask), "lengths": dict(lengths=lengths), None: {}}[padding]

    def value_and_gradients(implementation, dtype):
        def total(*parts):
            out = attend(*parts, **said, causal=causal, implementation=implementation)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*(x.astype(dtype) for x in (q, k, v)))

    (_, exact), exact_gradients = value_and_gradients("xla", jnp.float32)
    for name in ("xla", "cudnn", "auto"):
        (_, out), gradients = value_and_gradients(name, jnp.bfloat16)
        # bfloat16 keeps 8 bits; an average and its gradient chain a handful of roundings.
        for got, want in zip((out, *gradients), (exact, *exact_gradients), strict=True):
            assert jnp.linalg.norm(got - want) < 5 * 2**-8 * jnp.linalg.norm(want), name


@pytest.mark.parametrize("causal", [True, False])
def test_lengths_are_a_mask_of_the_first_keys(causal):
    q, k, v = drawn(12, jnp.float32)
    mask = View(real=within(jnp.array([12, 5]), 12)).allowed(12, causal=causal)
    masked = attend(q, k, v, mask=mask, causal=causal, implementation="xla")
    short = attend(q, k, v, lengths=jnp.array([12, 5]), causal=causal, implementation="xla")
    np.testing.assert_allclose(short, masked, atol=1e-6)
    empty = attend(q, k, v, lengths=jnp.array([12, 0]), causal=causal, implementation="xla")
    assert jnp.isfinite(empty).all()


@pytest.mark.parametrize("options", [dict(), dict(kind="encoder"), dict(positions="learned", kv_heads=1)])
def test_cudnn_is_told_lengths_and_the_others_a_mask(options, make_model, tokens, monkeypatch):
    """Here XLA stands in for cuDNN: what it is told is enough for the same result."""
    model, lengths = make_model(**options), np.array([6, 4], np.int32)
    masked = model(tokens, mask=np.arange(6) < lengths[:, None])
    np.testing.assert_allclose(model(Inputs(tokens, lengths=lengths)), masked, atol=1e-5)
    told, attend_ = [], attention.attend

    def stand_in(*parts, implementation, **said):
        told.append({name for name, value in said.items() if value is not None and name != "causal"})
        return attend_(*parts, **said, implementation="xla")

    monkeypatch.setattr(attention, "choose_implementation", lambda implementation, q, k: "cudnn")
    monkeypatch.setattr(attention, "attend", stand_in)
    by_xla = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: by_xla(*a, **k | {"implementation": "xla"}))
    np.testing.assert_allclose(model(Inputs(tokens, lengths=lengths)), masked, atol=1e-5)
    model(Inputs(tokens, lengths=lengths, segments=np.zeros_like(tokens)))
    assert told == [{"lengths"}, {"mask"}], "documents need a mask"
    if model.config.kind == "decoder":
        plan = model.plan()
        memory = model.memory(plan, batch=2, room=8)
        _, memory = model.run(Inputs(tokens, lengths=lengths), plan, memory=memory)
        model.run(Inputs(tokens[:, :2], lengths=lengths // 3), plan, memory=memory)
        assert told[2:] == [{"lengths"}, {"mask"}], "so do keys of a memory"


def test_queries_fewer_than_keys_look_back_from_their_own_place():
    real = jnp.arange(6)[None] < 5
    allowed = View(real=real, start=jnp.int32(3)).allowed(2, causal=True)
    np.testing.assert_array_equal(allowed[0, 0], [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])


def test_rotation_and_gates_are_computed_in_float32():
    """Rounding the angles too would move a rotated vector by more than its own rounding."""
    x = drawn(512)[0]
    angles = rotary_angles(jnp.arange(512), 64, 10_000.0)
    exact = rotate(x.astype(jnp.float32), angles)
    np.testing.assert_array_equal(rotate(x, angles), exact.astype(jnp.bfloat16))
    # 1.005 is 1.0078 in bfloat16, and the product then 203 in place of 202.
    found = scaled(jnp.bfloat16(201), jnp.float32(1.005))
    assert found.dtype == jnp.bfloat16 and float(found) == 202

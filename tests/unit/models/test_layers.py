"""The layers against plain NumPy, in float64: each is usable alone and computes what its formula says.

Tolerances: a layer chains at most a dozen float32 sums of up to 24 terms of order one, so its result is off by at
most some 50 roundings of 6e-8, 3e-6.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from odelm.models import Attention, Embed, FeedForward, Inputs, Modulation, Norm, Readout
from odelm.models.attention import rotate
from odelm.models.feedforward import activate
from odelm.models.modulation import time_features
from odelm.models.view import View, rotary_angles

ATOL = 50 * 6e-8
B, L, D, H, K = 2, 5, 16, 2, 8


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((B, L, D)).astype(np.float32)


def value(param) -> np.ndarray:
    return np.asarray(param[...], np.float64)


def norm(x, kind, scale, bias=0.0, eps=1e-6):
    x = np.asarray(x, np.float64)
    if kind == "layernorm":
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale + bias


def turned(x):
    """Rotates (B, L, H, K) by complex multiplication: the pair (k, k + K/2) is a complex number."""
    numbers = x[..., : K // 2] + 1j * x[..., K // 2 :]
    rates = 10_000.0 ** (-np.arange(K // 2) * 2 / K)
    numbers = numbers * np.exp(1j * np.arange(x.shape[1])[:, None, None] * rates)
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def attention(module, x, *, kind, causal, rotary, allowed):
    kernel, out = value(module.qkv.kernel), value(module.out.kernel)
    bias = value(module.qkv.bias) if module.qkv.bias is not None else np.zeros((3, H, K))
    q, k, v = (np.einsum("bld,dhk->blhk", x, kernel[:, i]) + bias[i] for i in range(3))
    if module.query_norm is not None:
        q, k = (
            norm(y, kind, value(n.scale), 0 if n.bias is None else value(n.bias))
            for y, n in ((q, module.query_norm), (k, module.key_norm))
        )
    if rotary:
        q, k = turned(q), turned(k)
    scores = np.einsum("blhk,bshk->bhls", q, k) / math.sqrt(K)
    keep = np.broadcast_to(allowed[:, None, None, :], scores.shape)
    if causal:
        keep = keep & np.tril(np.ones((L, L), bool))
    weights = scipy.special.softmax(np.where(keep, scores, -np.inf), axis=-1)
    result = np.einsum("bhls,bshk,hkd->bld", weights, v, out)
    return result + (0 if module.out.bias is None else value(module.out.bias))


@pytest.mark.parametrize(
    "options, masked",
    [
        (dict(kind="decoder", positions="rotary", qk_norm=True), False),
        (dict(kind="decoder", positions="learned", qk_norm=False, bias=True), True),
        (dict(kind="encoder", positions="rotary", qk_norm=True, norm="layernorm", bias=True), True),
    ],
)
def test_attention(make_config, randomise, x, options, masked):
    config = make_config(**options)
    module = randomise(Attention(config, rngs=nnx.Rngs(0)))
    allowed = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool) if masked else np.ones((B, L), bool)
    expected = attention(
        module,
        x,
        kind=config.norm,
        causal=config.kind == "decoder",
        rotary=config.positions == "rotary",
        allowed=allowed,
    )
    rotary = rotary_angles(np.arange(L), K, 10_000.0) if config.positions == "rotary" else None
    view = View(rotary, allowed) if masked else None
    np.testing.assert_allclose(module(x, view)[0], expected, rtol=0, atol=ATOL)


def test_rotation_depends_on_the_distance_only():
    q, k = np.random.default_rng(0).standard_normal((2, K)).astype(np.float32)
    angles = rotary_angles(np.arange(12), K, 10_000.0)
    one = jnp.ones((1, 12, 1, 1))
    scores = np.einsum(
        "lk,sk->ls",
        rotate(one * q[None, None, None], angles)[0, :, 0],
        rotate(one * k[None, None, None], angles)[0, :, 0],
    )
    for distance in range(11):
        diagonal = np.diagonal(scores, -distance)
        # Angles up to 11 are rounded to about 1e-6, which moves a score of order 5 by as much.
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=0, atol=2e-5)
    assert np.ptp(scores) > 0.1


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [False, True])
def test_norm(make_config, randomise, x, kind, bias):
    module = randomise(Norm(make_config(norm=kind, bias=bias), D), scale=0.5)
    scale, shift = value(module.scale), value(module.bias) if bias else 0.0
    np.testing.assert_allclose(module(x + 1), norm(x + 1, kind, scale, shift), rtol=0, atol=ATOL)
    gamma, beta = np.random.default_rng(2).standard_normal((2, D)).astype(np.float32)
    expected = norm(x + 1, kind, scale, shift) * (1 + gamma) + beta
    np.testing.assert_allclose(module(x + 1, module.affine(gamma, beta)), expected, rtol=0, atol=4 * ATOL)


def test_norm_of_bfloat16_is_computed_in_float32(make_config):
    x = (300 + np.random.default_rng(0).standard_normal((1, D)) * 4).astype(jnp.bfloat16)
    result = Norm(make_config(norm="layernorm"), D)(x)
    assert result.dtype == jnp.bfloat16
    # Only the result is rounded to 8 bits: half a unit in the last place of a number below 4 is 2**-7.
    np.testing.assert_allclose(result.astype(np.float32), norm(x.astype(np.float64), "layernorm", 1), atol=2**-7 + 1e-4)


ACTIVATIONS = {
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "swiglu": lambda x: (
        x[..., : x.shape[-1] // 2] * scipy.special.expit(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_feedforward(make_config, randomise, x, name):
    module = randomise(FeedForward(make_config(activation=name, bias=True), rngs=nnx.Rngs(0)))
    hidden = ACTIVATIONS[name](x @ value(module.up.kernel) + value(module.up.bias))
    expected = hidden @ value(module.down.kernel) + value(module.down.bias)
    # Relative to the largest entry: the squared ReLU reaches past one.
    np.testing.assert_allclose(module(x), expected, rtol=0, atol=ATOL * max(1, np.abs(expected).max()))


def test_the_two_gelus_differ(x):
    assert np.abs(activate(x, "gelu") - activate(x, "gelu_tanh")).max() > 1e-4


def test_an_unknown_activation_is_an_error():
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        activate(jnp.ones(2), "tanh")


def test_modulation(make_config, randomise):
    config = make_config(depth=4)
    fresh = Modulation(config, 6, rngs=nnx.Rngs(0))
    assert not np.any(fresh(jnp.float32(1.7))), "a new modulation leaves the block as it is"
    module = randomise(fresh)
    angles = np.pi / 2 * np.arange(1, 5) * 1.7 / 4
    hidden = np.concatenate([np.sin(angles), np.cos(angles)]) @ value(module.hidden.kernel) + value(module.hidden.bias)
    hidden = hidden * scipy.special.expit(hidden)
    expected = (hidden @ value(module.out.kernel) + value(module.out.bias)).reshape(6, D)
    np.testing.assert_allclose(module(jnp.float32(1.7)), expected, rtol=0, atol=ATOL)


def test_time_features_are_low_frequencies():
    features = time_features(np.linspace(0, 1, 101))
    assert features.shape == (101, 8)
    # At most one period of the highest frequency: it changes sign twice, the lowest not at all.
    assert (np.diff(np.sign(features[:, 7])) != 0).sum() == 2
    assert (features[1:-1, [0, 4]] > 0).all()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_embed(make_config, randomise, tokens, positions):
    config = make_config(positions=positions, token_types=2, embed_dim=8, embed_norm=True, bias=True)
    module = randomise(Embed(config, rngs=nnx.Rngs(0)))
    types = tokens % 2
    x = value(module.tokens)[tokens] + value(module.types)[types]
    if positions == "learned":
        x = x + value(module.learned)[: tokens.shape[1]]
    if positions == "sinusoidal":
        angles = np.arange(tokens.shape[1])[:, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
        x = x + np.stack([np.sin(angles), np.cos(angles)], -1).reshape(-1, 8) / math.sqrt(8)
    x = norm(x, "rmsnorm", value(module.norm.scale), value(module.norm.bias))
    expected = x @ value(module.project.kernel) + value(module.project.bias)
    # Normalising and projecting add their rounding to that of the sums.
    np.testing.assert_allclose(module(Inputs(tokens, token_types=types)), expected, rtol=0, atol=2 * ATOL)
    assert np.abs(module(Inputs(tokens, token_types=types)) - module(Inputs(tokens))).max() > 0.01


def test_decoder_readout_is_the_transposed_embedding(make_config, x):
    module = Readout(make_config(), rngs=nnx.Rngs(0))
    table = np.random.default_rng(3).standard_normal((13, D)).astype(np.float32)
    np.testing.assert_allclose(module(x, table), x @ table.T, rtol=0, atol=4 * ATOL)


def test_encoder_readout_transforms_first(make_config, randomise, x):
    config = make_config(kind="encoder", embed_dim=8, activation="gelu", norm="layernorm", bias=True)
    module = randomise(Readout(config, rngs=nnx.Rngs(0)))
    table = np.random.default_rng(3).standard_normal((13, 8)).astype(np.float32)
    hidden = ACTIVATIONS["gelu"](x @ value(module.project.kernel) + value(module.project.bias))
    hidden = norm(hidden, "layernorm", value(module.norm.scale), value(module.norm.bias))
    expected = hidden @ table.T + value(module.bias)
    np.testing.assert_allclose(module(x, table), expected, rtol=0, atol=8 * ATOL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_float32_whatever_the_products_are(make_config, dtype, x):
    module = Readout(make_config(dtype=dtype), rngs=nnx.Rngs(0))
    assert jax.eval_shape(module, x, np.ones((13, D), np.float32)).dtype == jnp.float32

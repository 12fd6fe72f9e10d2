"""The loss in pieces is the plain loss, and so are its gradients; what it holds is bounded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from odelm.models import cross_entropy
from odelm.models.cross_entropy import Teacher, _count_pieces, summed_cross_entropy

B, L, E, V = 3, 12, 8, 40
WHOLE = 4 * B * L * V


def drawn(dtype=jnp.float32, bias: bool = True, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((B, L, E)), dtype)
    matrix = jnp.asarray(rng.standard_normal((V, E)), jnp.float32)
    shift = jnp.asarray(rng.standard_normal(V), jnp.float32) if bias else None
    targets = jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32)
    return x, matrix, shift, targets, jnp.asarray(rng.integers(0, 2, (B, L)), jnp.float32)


def plain(x, matrix, bias, targets, weights, z_loss):
    logits = jnp.einsum("ble,ve->blv", x.astype(jnp.float32), matrix) + (0 if bias is None else bias[None, None])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return ((nats + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2) * weights).sum(), nats * weights


@pytest.fixture(params=[False, True], ids=["two passes", "one pass"])
def once(request, monkeypatch):
    """The logits are read as on a CPU, and as on a GPU."""
    monkeypatch.setattr(cross_entropy, "reads_once", lambda: request.param)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("pieces", [1, 3, 12])
def test_values_and_gradients_are_those_of_the_whole(bias, z_loss, pieces):
    x, matrix, shift, targets, weights = drawn(bias=bias)
    which = (0, 1, 2) if bias else (0, 1)

    def factored(loss):
        # The sum's factor and a second use of it must reach the gradients.
        def objective(*parts):
            total, nats = loss(*parts)
            return total * 0.3 + jnp.sin(total), nats

        return jax.jit(jax.value_and_grad(objective, which, has_aux=True))(x, matrix, shift, targets, weights)

    size = -(-WHOLE // pieces)
    assert _count_pieces((B, L), V, size) == pieces
    (got, nats), gradients = factored(lambda *a: summed_cross_entropy(*a, z_loss=z_loss, piece_bytes=size))
    (want, each), exact = factored(lambda *a: plain(*a, z_loss))
    # float32 sums of 36 terms of size 1 to 10, in another order.
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(nats, each, rtol=1e-5, atol=1e-5)
    for left, right in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)
    value, _ = summed_cross_entropy(x, matrix, shift, targets, weights, z_loss=z_loss, piece_bytes=size)
    np.testing.assert_allclose(value * 0.3 + jnp.sin(value), got, rtol=1e-5)


@pytest.mark.usefixtures("once")
def test_sixteen_bits_cost_their_rounding():
    x, matrix, shift, targets, weights = drawn(jnp.bfloat16)

    def total(loss, x, matrix, shift):
        return loss(x, matrix, shift, targets, weights)[0]

    got = jax.grad(lambda *a: total(summed_cross_entropy, *a), (0, 1, 2))(x, matrix, shift)
    exact = jax.grad(lambda *a: total(lambda *b: plain(*b, 0.0), *a), (0, 1, 2))(x, matrix, shift)
    assert [g.dtype for g in got] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for left, right in zip(got, exact, strict=True):
        # Logits of size 10 in 8 bits move a probability by 2 %.
        assert jnp.linalg.norm(left.astype(jnp.float32) - right) < 0.03 * jnp.linalg.norm(right.astype(jnp.float32))


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_one_pass_over_logits_of_any_size_gives_what_two_do(shift, monkeypatch):
    logits = 30 * jax.random.normal(jax.random.key(0), (3, 5, V)) + shift
    logits = jnp.concatenate([logits, jnp.full((1, 5, V), shift)]).at[1, 2, 3].set(shift + 500)
    targets = jnp.arange(20, dtype=jnp.int32).reshape(4, 5)
    found = {}
    for once in (False, True):
        monkeypatch.setattr(cross_entropy, "reads_once", lambda once=once: once)
        found[once] = cross_entropy.read_logits(logits, targets)
    for left, right in zip(found[True], found[False], strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=2e-3)  # a digit of 1e4 in float32 is 1e-3
    bad = cross_entropy.read_logits(logits.at[0, 0, 0].set(jnp.nan), targets)
    assert jnp.isnan(bad[0][0, 0]) and jnp.isfinite(bad[0].at[0, 0].set(0.0)).all()


def test_the_shares_have_no_gradient():
    x, matrix, shift, targets, weights = drawn()
    gradient = jax.grad(lambda x: summed_cross_entropy(x, matrix, shift, targets, weights)[1].sum())(x)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(("length", "size", "pieces"), [(12, WHOLE, 1), (12, WHOLE // 5, 6), (7, WHOLE // 10, 7)])
def test_pieces_are_of_equal_length(length, size, pieces):
    assert _count_pieces((B, length), V, size) == pieces


def test_no_more_than_a_piece_of_the_logits_is_held():
    rows, length, words = 4, 256, 4096
    shapes = [(rows, length, E), (words, E)]
    targets, weights = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))

    def held(size: int) -> int:
        def objective(x, matrix):
            return summed_cross_entropy(x, matrix, None, targets, weights, piece_bytes=size)[0]

        lowered = jax.jit(jax.grad(objective, (0, 1))).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    whole = 4 * rows * length * words
    assert held(whole) > whole
    assert held(whole // 16) < whole / 3


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_teacher_takes_the_place_of_a_share_of_the_targets(pieces):
    x, matrix, shift, targets, weights = drawn()
    taught, share = drawn(seed=1)[0], 0.7

    def wanted(x, matrix, shift):
        total, nats = plain(x, matrix, shift, targets, weights, 0.1)
        logits, those = (jnp.einsum("ble,ve->blv", h, matrix) + shift[None, None] for h in (x, taught))
        chances = jax.lax.stop_gradient(jax.nn.softmax(those))
        learned = optax.softmax_cross_entropy(logits, chances) * weights
        return total + share * (learned - nats).sum(), nats

    def given(x, matrix, shift):
        return summed_cross_entropy(
            x, matrix, shift, targets, weights, z_loss=0.1, teacher=Teacher(taught, share), piece_bytes=WHOLE // pieces
        )

    (got, nats), gradients = jax.value_and_grad(given, (0, 1, 2), has_aux=True)(x, matrix, shift)
    (want, each), exact = jax.value_and_grad(wanted, (0, 1, 2), has_aux=True)(x, matrix, shift)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(given(x, matrix, shift)[0], want, rtol=1e-5)
    np.testing.assert_allclose(nats, each, rtol=1e-5, atol=1e-5)
    for left, right in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)
    plainly = summed_cross_entropy(x, matrix, shift, targets, weights, z_loss=0.1)[0]
    assert abs(float(plainly) - float(want)) > 1
    by_itself = jax.grad(lambda h: summed_cross_entropy(
        x, matrix, shift, targets, weights, teacher=Teacher(h, share))[0])(taught)  # fmt: skip
    np.testing.assert_array_equal(by_itself, 0)

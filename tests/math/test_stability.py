"""A post-norm model trained at random step counts survives large projected steps, and not plain Euler ones."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import odelm

DEPTH, VOCAB, UPDATES = 8, 16, 500


def batch(rng: np.random.Generator) -> np.ndarray:
    """Returns int32 (16, 9): a random token, and after each token `x` the token `5 x + 3` modulo the vocabulary."""
    rows = [rng.integers(0, VOCAB, 16)]
    for _ in range(8):
        rows.append((5 * rows[-1] + 3) % VOCAB)
    return np.stack(rows, axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def trained():
    """Returns the loss as a function of (params, tokens, steps, solver), and trained parameters."""
    config = odelm.ModelConfig(
        vocab_size=VOCAB, width=16, heads=2, depth=DEPTH, feedforward=32, max_length=12, norm_placement="post"
    )
    graph, params = nnx.split(odelm.create(config, rngs=nnx.Rngs(0)))

    def loss(params, tokens, steps, solver="euler"):
        logits = nnx.merge(graph, params)(tokens[:, :-1], steps=steps, solver=solver)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    optimizer = optax.adam(3e-3)

    def update(params, state, tokens, steps):
        updates, state = optimizer.update(jax.grad(loss)(params, tokens, steps), state)
        return optax.apply_updates(params, updates), state

    update = jax.jit(update, static_argnums=3)
    rng, state = np.random.default_rng(0), optimizer.init(params)
    for _ in range(UPDATES):
        params, state = update(params, state, batch(rng), int(rng.choice([2, 8])))
    return jax.jit(loss, static_argnums=(2, 3)), params


@pytest.mark.thorough
def test_projected_steps_of_size_four_keep_the_loss(trained):
    loss, params = trained
    held_out = batch(np.random.default_rng(1))
    full, coarse = float(loss(params, held_out, DEPTH)), float(loss(params, held_out, DEPTH // 4))
    plain = float(loss(params, held_out, DEPTH // 4, diffrax.Euler()))
    uniform = float(jnp.log(VOCAB))
    learned = uniform - full
    assert learned > 0.8 * uniform, f"the toy task was not learned: loss {full}, {uniform} untrained"
    # Training saw both counts, so large steps keep what was learned, but for a twentieth at the most. Plain Euler's
    # step goes from h to 4 Block(h) - 3 h, which amplifies the state: its loss is many times that of either.
    assert abs(coarse - full) < 0.05 * learned, f"loss {coarse} in steps of 4, {full} in unit steps"
    assert not plain < 10 * max(full, coarse), f"loss {plain} by plain Euler, {coarse} by projected steps of 4"

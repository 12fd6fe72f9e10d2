"""What a position may depend on, read off the gradient: a decoder looks back, an encoder both ways."""

import jax
import numpy as np
import pytest
from flax import nnx

TOKENS = np.array([[3, 1, 4, 11, 5]], np.int32)
LENGTH = TOKENS.shape[1]
CALLS = {
    "full": dict(),
    "coarse": dict(steps=1),
    "non-uniform": dict(grid=[0, 0.3, 2.5, 4]),
    "heun": dict(steps=2, solver="heun"),
}


def influence(model, **call) -> np.ndarray:
    """Returns (L, L): the largest derivative of the logits at i by the embedding of the token at j.

    All tokens differ and the readout has a matrix of its own, so row TOKENS[0, j] of the embedding acts at j alone.
    """
    graph, params = nnx.split(model)
    weights = np.random.default_rng(0).standard_normal(model.config.vocab_size).astype(np.float32)

    def outputs(params):
        return nnx.merge(graph, params)(TOKENS, **call)[0] @ weights

    jacobian = jax.jit(lambda params: nnx.to_pure_dict(jax.jacrev(outputs)(params))["embed"]["tokens"])(params)
    return np.abs(jacobian[:, TOKENS[0]]).max(axis=-1)


@pytest.mark.parametrize("placement, call", [("pre", name) for name in CALLS] + [("post", "coarse")])
def test_decoder_looks_back_only(make_model, placement, call):
    reach = influence(make_model(norm_placement=placement, tie_readout=False), **CALLS[call])
    past = np.tril(np.ones((LENGTH, LENGTH), bool))
    assert (reach[~past] == 0).all(), f"a position depends on a later one:\n{reach}"
    assert (reach[past] > 0).all(), f"a position does not depend on itself or an earlier one:\n{reach}"


def test_encoder_looks_both_ways(make_model):
    assert (influence(make_model(kind="encoder", tie_readout=False)) > 0).all()


def test_grouped_decoder_looks_back_only(make_model):
    reach = influence(make_model(groups=2, tie_readout=False), steps=2)
    np.testing.assert_array_equal(reach > 0, np.tril(np.ones((LENGTH, LENGTH), bool)))
    assert np.isfinite(reach).all()

"""Rows that pack several documents: each is read as if it were alone.

Tolerance: the keys of other documents weigh exactly nothing, so packing only changes the order and the blocking of
sums. A model of four blocks chains about 100 float32 sums of up to 24 terms; logits are of order 3.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from odelm.errors import InputError
from odelm.models import Attention, Inputs
from odelm.models.inputs import positions_within
from odelm.models.loss import loss_sums
from odelm.models.view import rotary_angles, see
from tests.calls import compiled
from tests.thorough import few, thorough

ATOL = 3 * 200 * 6e-8

# Within a row all tokens differ, so that a token's embedding acts at one place alone.
TOKENS = np.array([[3, 1, 4, 11, 5, 9, 2, 7], [10, 0, 6, 8, 1, 3, 12, 5]], np.int32)
SEGMENTS = np.array([[0, 0, 0, 1, 1, 2, 2, 2], [4, 4, 5, 5, 5, 8, 8, 8]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 0, 1, 2]], np.int32)

# Every kind with all positions and placements; shared and grouped take turns, so that each meets all of the others.
KINDS = {
    f"{kind} {positions} {placement}": dict(
        kind=kind, positions=positions, norm_placement=placement, groups=1 + (i + j + k) % 2
    )
    for (i, kind), (j, positions), (k, placement) in itertools.product(
        enumerate(("decoder", "encoder")),
        enumerate(("learned", "sinusoidal", "rotary")),
        enumerate(("pre", "post")),
    )
}
# Each of the options is in one of them.
CHOSEN = [
    "decoder learned pre", "decoder rotary post", "encoder sinusoidal post",
]  # fmt: skip
VARIANTS: list[tuple[dict, dict]] = [
    (dict(kind="decoder", positions="rotary"), dict(steps=3)),
    (dict(kind="encoder", positions="learned", norm_placement="post"), dict(steps=3)),
    (dict(kind="decoder", positions="sinusoidal", embed_dim=8, groups=2), dict(grid=[0, 0.5, 2, 4], solver="heun")),
    (dict(kind="decoder", layer_rank=2, inner_blocks=2, time_modulation=False), dict(remat="nothing_saveable")),
    (dict(kind="encoder", layer_rank=1, norm_placement="post", inner_blocks=2), dict(steps=2)),
    (dict(kind="encoder", time_modulation=False, parallel_branches=True, embed_norm=True), dict(steps=1)),
]


def named(value: dict) -> str:
    return " ".join(str(v) for v in value.values())


def alone(run: Callable[[np.ndarray], jax.Array]) -> np.ndarray:
    """Returns what `run` (1, l) -> (1, l, ..) makes of each document in a row of its own, laid out as packed."""
    rows = [
        np.concatenate([run(row[None, ids == segment]) for segment in np.unique(ids)], axis=1)
        for row, ids in zip(TOKENS, SEGMENTS, strict=True)
    ]
    return np.concatenate(rows)


@pytest.mark.parametrize(
    "options, call",
    few({name: (options, {}) for name, options in KINDS.items()}, *CHOSEN)
    + few({f"{named(options)} {named(call)}": (options, call) for options, call in VARIANTS}, "encoder 1 post 2 2"),
)
def test_packed_documents_have_the_logits_they_have_alone(make_model, options, call):
    graph, params = nnx.split(make_model(**options))

    @jax.jit
    def run(params, tokens, segments):
        model = nnx.merge(graph, params)
        return model(tokens, segments=segments, plan=model.plan(**call))

    apart = alone(lambda tokens: run(params, tokens, None))
    np.testing.assert_allclose(run(params, TOKENS, SEGMENTS), apart, rtol=0, atol=ATOL)


@pytest.mark.thorough
@pytest.mark.parametrize("options", [dict(), dict(kind="encoder", positions="learned", groups=2)], ids=named)
def test_packed_documents_have_the_adaptive_states_they_have_alone(make_model, options):
    graph, params = nnx.split(make_model(**options))

    @jax.jit
    def run(params, tokens, segments):
        return nnx.merge(graph, params).encode_adaptive(tokens, tolerance=1e-4, segments=segments)[0]

    apart = alone(lambda tokens: run(params, tokens, None))
    # Steps are chosen for the whole batch: fewer than 50 of them, each off by the tolerance of a state of order one.
    assert np.abs(run(params, TOKENS, SEGMENTS) - apart).max() < 50 * 1e-4
    assert np.abs(run(params, TOKENS, None) - apart).max() > 0.01


def influence(model, **call) -> np.ndarray:
    """Returns (L, L): the largest derivative of the logits at i by the embedding of the token at j, of row 0."""
    graph, params = nnx.split(model)
    weights = np.random.default_rng(0).standard_normal(model.config.vocab_size).astype(np.float32)

    def outputs(params):
        return nnx.merge(graph, params)(TOKENS[:1], segments=SEGMENTS[:1], **call)[0] @ weights

    jacobian = jax.jit(lambda params: nnx.to_pure_dict(jax.jacrev(outputs)(params))["embed"]["tokens"])(params)
    return np.abs(jacobian[:, TOKENS[0]]).max(axis=-1)


@pytest.mark.parametrize(
    "options, call",
    [
        (dict(positions="rotary"), dict()),
        (dict(positions="learned", norm_placement="post", groups=2), dict(steps=2)),
        (dict(kind="encoder", positions="sinusoidal"), dict(steps=3)),
        thorough(dict(kind="encoder", positions="rotary", norm_placement="post", layer_rank=2, inner_blocks=2), dict()),
    ],
    ids=named,
)
def test_a_document_does_not_depend_on_another(make_model, options, call):
    model = make_model(tie_readout=False, **options)
    reach = influence(model, **call)
    expected = SEGMENTS[0][:, None] == SEGMENTS[0]
    if model.config.kind == "decoder":
        expected &= np.tril(expected)
    np.testing.assert_array_equal(reach > 0, expected)
    assert np.isfinite(reach).all()


@pytest.mark.parametrize("kind", few(["decoder", "encoder"], "decoder"))
@pytest.mark.parametrize("padding", [2, 3], ids=["in the last segment", "in a segment of its own"])
def test_padding_changes_nothing_and_its_gradients_are_finite(make_model, kind, padding):
    graph, params = nnx.split(make_model(kind=kind))
    tokens = np.pad(TOKENS[:1], ((0, 0), (0, 3)), constant_values=6)
    segments = np.pad(SEGMENTS[:1], ((0, 0), (0, 3)), constant_values=padding)
    mask = np.arange(tokens.shape[1])[None] < TOKENS.shape[1]

    @jax.jit
    def run(params):
        def mean(params):
            logits = nnx.merge(graph, params)(tokens, mask=mask, segments=segments)
            return jnp.mean(jnp.square(logits)), logits

        unpadded = nnx.merge(graph, params)(TOKENS[:1], segments=SEGMENTS[:1])
        return jax.grad(mean, has_aux=True)(params), unpadded

    (gradients, logits), expected = run(params)
    np.testing.assert_allclose(logits[mask], expected[0], rtol=0, atol=ATOL)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("kind", "positions"),
    few(
        itertools.product(("decoder", "encoder"), ("learned", "sinusoidal", "rotary")),
        ("encoder", "learned"), ("decoder", "sinusoidal"), ("decoder", "rotary"),
    ),
)  # fmt: skip
def test_one_segment_is_none(make_model, kind, positions):
    graph, params = nnx.split(make_model(kind=kind, positions=positions))
    run = jax.jit(lambda params, segments: nnx.merge(graph, params)(TOKENS, segments=segments))
    np.testing.assert_allclose(run(params, np.full_like(TOKENS, 7)), run(params, None), rtol=0, atol=ATOL)


def test_positions_start_again_in_each_segment():
    np.testing.assert_array_equal(positions_within(SEGMENTS), POSITIONS)
    np.testing.assert_array_equal(positions_within(SEGMENTS[:, :1]), [[0], [0]])


def test_rotary_angles_start_again_in_each_segment(make_config, randomise):
    # Rotary attention depends on distances alone, so that logits tell a place in the row by its rounding only.
    config = make_config(positions="rotary")
    _, view, _ = see(Inputs(TOKENS, segments=SEGMENTS), config, None)
    cos, sin = rotary_angles(np.arange(TOKENS.shape[1]), config.head_size, config.rotary_base)
    np.testing.assert_array_equal(view.angles, (cos[POSITIONS], sin[POSITIONS]))

    attention = compiled(randomise(Attention(config, rngs=nnx.Rngs(0))))
    x = np.random.default_rng(1).standard_normal((*TOKENS.shape, config.width), np.float32)
    unturned = dataclasses.replace(view, angles=(jnp.ones_like(cos), jnp.zeros_like(sin)))
    assert np.abs(attention(x, view)[0] - attention(x, unturned)[0]).max() > 0.01


def test_the_loss_of_a_packed_batch_is_that_of_its_documents(make_model):
    graph, params = nnx.split(make_model())
    nats = jax.jit(lambda params, batch: loss_sums(nnx.merge(graph, params), batch).nats)
    tokens, ids = TOKENS[:1], SEGMENTS[0]
    whole = {"tokens": tokens, "targets": np.roll(tokens, 1, axis=1), "weights": np.ones(tokens.shape, np.float32)}
    documents = [{name: array[:, ids == segment] for name, array in whole.items()} for segment in np.unique(ids)]
    expected = sum(float(nats(params, document)) for document in documents)
    # A sum of 8 terms, each as exact as a logit.
    assert float(nats(params, {**whole, "segments": ids[None]})) == pytest.approx(expected, abs=8 * ATOL)
    assert abs(float(nats(params, whole)) - expected) > 0.01


@pytest.mark.parametrize("segments", [SEGMENTS[:, :7], SEGMENTS[0], SEGMENTS[:1]], ids=["short", "flat", "one row"])
def test_segments_of_another_shape_are_named(make_model, segments):
    wanted = rf"segments are of shape \({', ?'.join(map(str, segments.shape))},?\), expected .* \(2, 8\)"
    with pytest.raises(InputError, match=wanted):
        make_model()(TOKENS, segments=segments)
    with pytest.raises(InputError, match=wanted):
        make_model().encode_adaptive(TOKENS, tolerance=0.1, segments=segments)

"""A memory of one grid read on another: exact at shared times, between two of them interpolated."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odelm.infer.generator import Generator
from odelm.models.inputs import Inputs
from odelm.models.retime import retimed
from tests.calls import compiled
from tests.thorough import few

OPTIONS = dict(depth=6, prelude=1, coda=1, max_length=16)


def remembered(model, plan, tokens):
    memory = model.memory(plan, batch=len(tokens), room=tokens.shape[1])
    return compiled(model.run)(Inputs(tokens), plan, memory=memory)[1]


def core(memory) -> np.ndarray:
    """Returns the keys of the core, (N, R, B, S, H, K)."""
    return np.asarray(memory.blocks[1].keys)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(**OPTIONS)


GRIDS = {
    "contained": ([0, 1, 2, 3, 4], [0, 1, 3, 4], lambda k: k[[0, 1, 3]]),
    "between": ([0, 1, 3, 4], [0, 0.5, 2.5, 4], lambda k: [k[0], (k[0] + k[1]) / 2, k[1] / 4 + 3 * k[2] / 4]),
    "after the last": ([0, 2, 4], [0, 1, 2, 3, 4], lambda k: [k[0], (k[0] + k[1]) / 2, k[1], k[1]]),
    "from one step": ([0, 4], [0, 1, 4], lambda k: k[[0, 0]]),
}


@pytest.mark.parametrize("source, target, expected", GRIDS.values(), ids=GRIDS)
def test_keys_are_found_by_their_time(source, target, expected, model, tokens):
    plans = compiled(model.plan)(grid=source), compiled(model.plan)(grid=target)
    memory = remembered(model, plans[0], tokens)
    found = jax.jit(partial(retimed, model))(memory, *plans)
    assert len(set(core(memory)[:, 0, 0, 0, 0, 0].tolist())) == len(source) - 1, "times must differ"
    np.testing.assert_allclose(core(found), expected(core(memory)), atol=1e-6)
    np.testing.assert_array_equal(found.blocks[0].keys, memory.blocks[0].keys)


def test_where_times_are_shared_nothing_is_rounded(model, tokens):
    fine, coarse = compiled(model.plan)(), compiled(model.plan)(steps=2)
    memory = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim == 6 else x, remembered(model, fine, tokens))
    found = retimed(model, memory, fine, coarse)
    np.testing.assert_array_equal(core(found).astype(np.float32), core(memory)[[0, 2]].astype(np.float32))


def test_a_method_of_several_stages_finds_its_own(model, tokens):
    plan = compiled(model.plan)(grid=[0, 1, 2, 4], solver="heun")
    memory = remembered(model, plan, tokens)
    for leaf, same in zip(*map(jax.tree.leaves, (memory, retimed(model, memory, plan, plan))), strict=True):
        np.testing.assert_array_equal(leaf, same)
    # The first stages of it are where Euler's method looks.
    found = retimed(model, memory, plan, compiled(model.plan)(grid=[0, 2, 4]))
    np.testing.assert_array_equal(core(found), core(memory)[[0, 2], :1])


@pytest.mark.parametrize(
    "before, after", few({"fine": (dict(), dict(steps=2)), "coarse": (dict(steps=2), dict())}, "coarse")
)
def test_prompts_may_cross_another_grid(before, after, model, tokens):
    """The tokens are those of a memory whose keys were moved by hand."""
    prompts, N = tokens.tolist(), 5
    options = {f"prefill_{name}": value for name, value in (before or dict(steps=4)).items()}
    found = Generator(model, **after, **options)(prompts, new_tokens=N)
    first, second = compiled(model.plan)(**before), compiled(model.plan)(**after)
    own = remembered(model, first, tokens)
    moved = {4: [0, 2], 2: [0, 0, 1, 1]}[len(core(own))]
    half = np.array([0, 0.5, 0, 0])[: len(moved)].reshape(-1, 1, 1, 1, 1, 1) * (len(moved) == 4)
    upper = np.minimum(np.array(moved) + 1, len(core(own)) - 1)

    def by_hand(leaf):
        leaf = np.asarray(leaf)
        return leaf if len(leaf) == 1 else (1 - half) * leaf[moved] + half * leaf[upper]

    blocks = jax.tree.map(lambda leaf: jnp.asarray(by_hand(leaf), jnp.float32), own.blocks)
    memory = type(own)(blocks, own.length, own.real, own.segments).widened(N)
    token = jnp.argmax(compiled(model)(tokens, plan=first)[:, -1], axis=-1).astype(jnp.int32)
    for step in range(N):
        assert token.tolist() == [row[step] for row in found]
        hidden, memory = compiled(model.run)(Inputs(token[:, None]), second, memory=memory)
        token = jnp.argmax(compiled(model.readout)(hidden[:, 0]), axis=-1).astype(jnp.int32)

"""A memory of the first positions gives the rest of a sequence what a pass over the whole of it gives.

Tolerance: the two sum over the same keys in blocks of another size; a model of six blocks chains about 150 float32
sums of up to 24 terms, of logits of order 3. A missing or misplaced key moves logits by 0.01 and more.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from odelm import ode
from odelm.errors import InputError
from odelm.models import Inputs
from tests.calls import compiled
from tests.thorough import few

ATOL = 3 * 300 * 6e-8
TOKENS = np.array([[3, 1, 4, 11, 5, 9, 2, 7], [10, 0, 6, 8, 1, 3, 12, 5]], np.int32)
ENDS = dict(depth=6, prelude=1, coda=1)

MODELS = {
    "pre": dict(),
    "post": dict(norm_placement="post"),
    "groups": dict(groups=2),
    "ends": ENDS,
    "post, groups, ends": dict(norm_placement="post", groups=2, **ENDS),
    "learned positions": dict(positions="learned"),
    "chain": dict(inner_blocks=2),
    "parallel, post": dict(norm_placement="post", parallel_branches=True, positions="sinusoidal"),
    "lanes": dict(lanes=2, wide_modulation=True, **ENDS),
    "fewer key-value heads": dict(width=32, heads=4, kv_heads=2, inner_blocks=2),
    "layer residuals": dict(layer_rank=2, time_modulation=False),
}
GRIDS = {
    "full": dict(),
    "coarse": dict(steps=2),
    "non-uniform": dict(grid=[0, 0.5, 2, 4]),
}


def parts_of(inputs: Inputs, at: int) -> tuple[Inputs, Inputs]:
    """Returns the first `at` positions and the rest."""
    return jax.tree.map(lambda x: x[:, :at], inputs), jax.tree.map(lambda x: x[:, at:], inputs)


def outcomes(model, inputs: Inputs, cuts: tuple[int, ...], call: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hidden states of one pass, and those of several that hand a memory on."""
    graph, params = nnx.split(model)

    @jax.jit
    def run(params, inputs):
        model = nnx.merge(graph, params)
        plan = model.plan(**call)
        whole, none = model.run(inputs, plan)
        assert none is None
        memory, found, rest, done = model.memory(plan, batch=2, room=12), [], inputs, 0
        for cut in (*cuts, inputs.shape[1]):
            now, rest = parts_of(rest, cut - done)
            hidden, memory = model.run(now, plan, memory=memory)
            found.append(hidden)
            done = cut
        return whole, jnp.concatenate(found, axis=1), memory.length

    whole, found, length = run(params, inputs)
    assert int(length) == inputs.shape[1]
    return whole, found


ALL = [(name, grid) for name in MODELS for grid in GRIDS]
# Each option and each grid is in one of them.
CHOSEN = [
    ("pre", "full"), ("post, groups, ends", "coarse"), ("learned positions", "non-uniform"), ("lanes", "coarse"),
    ("fewer key-value heads", "full"), ("layer residuals", "non-uniform"), ("parallel, post", "full"),
]  # fmt: skip


@pytest.mark.parametrize("name, grid", few(ALL, *CHOSEN))
def test_every_model_and_grid(make_model, name, grid):
    cuts = (3, 4) if grid == "coarse" else (3,)
    whole, found = outcomes(make_model(**MODELS[name]), Inputs(TOKENS), cuts, GRIDS[grid])
    np.testing.assert_allclose(found, whole, rtol=0, atol=ATOL)


# A method is followed within a group; that each group has a memory of its own is tested above, and here with heun.
@pytest.mark.parametrize(
    "solver, placement",
    few(
        itertools.product(sorted(ode.SOLVERS), ("pre", "post")),
        ("heun", "pre"), ("rk4", "post"),
    ),
)  # fmt: skip
def test_every_explicit_method(make_model, solver, placement):
    options = dict(groups=2, **ENDS) if solver == "heun" else dict(depth=2)
    grid = [0, 0.5, 2, 4] if solver == "heun" else [0, 0.5, 2]
    model = make_model(norm_placement=placement, **options)
    whole, found = outcomes(model, Inputs(TOKENS), (3,), dict(grid=grid, solver=solver))
    np.testing.assert_allclose(found, whole, rtol=0, atol=3 * ATOL)


def test_documents_of_a_row_stay_apart_across_the_cut(make_model):
    segments = np.array([[0, 0, 0, 1, 1, 2, 2, 2], [4, 4, 5, 5, 5, 8, 8, 8]], np.int32)
    whole, found = outcomes(make_model(positions="learned"), Inputs(TOKENS, segments=segments), (4, 6), dict(steps=2))
    np.testing.assert_allclose(found, whole, rtol=0, atol=ATOL)


def test_padding_in_the_memory_is_not_attended_to(make_model):
    """Rows of unequal prompts: padding stands in the memory between a prompt and what comes after it."""
    model = make_model()
    plan = compiled(model.plan)(steps=2)
    short = TOKENS[1:, :3]
    expected = compiled(model.run)(Inputs(np.concatenate([short, TOKENS[1:, 5:]], axis=1)), plan)[0][:, 3:]
    mask = np.array([[1] * 5, [1, 1, 1, 0, 0]], bool)
    memory = model.memory(plan, batch=2, room=8)
    _, memory = compiled(model.run)(Inputs(TOKENS[:, :5], mask=mask), plan, memory=memory)
    positions = np.array([[5, 6, 7], [3, 4, 5]], np.int32)
    found, _ = compiled(model.run)(Inputs(TOKENS[:, 5:], positions=positions), plan, memory=memory)
    np.testing.assert_allclose(found[1:], expected, rtol=0, atol=ATOL)


def test_one_program_takes_every_length_of_a_memory(make_model):
    graph, params = nnx.split(make_model())
    plan, traces = compiled(make_model().plan)(steps=2), []

    @jax.jit
    def step(params, tokens, memory):
        traces.append(1)
        return nnx.merge(graph, params).run(Inputs(tokens), plan, memory=memory)

    memory = make_model().memory(plan, batch=2, room=8)
    hidden = []
    for i in range(8):
        h, memory = step(params, TOKENS[:, i : i + 1], memory)
        hidden.append(h)
    assert len(traces) == 1
    expected = compiled(make_model().run)(Inputs(TOKENS), plan)[0]
    np.testing.assert_allclose(np.concatenate(hidden, axis=1), expected, rtol=0, atol=ATOL)


def test_what_a_memory_cannot_be_used_for_is_named(make_model):
    model = make_model()
    plan = compiled(model.plan)(steps=2)
    memory = model.memory(plan, batch=2, room=4)
    with pytest.raises(InputError, match="room for 4 positions of 2 rows, but 8 of 2 rows are given"):
        model.run(Inputs(TOKENS), plan, memory=memory)
    _, three = model.run(Inputs(TOKENS[:, :3]), plan, memory=memory)
    with pytest.raises(InputError, match="holds 3 positions of the 4 that it has room for, and 2 more are given"):
        model.run(Inputs(TOKENS[:, 3:5]), plan, memory=three)
    with pytest.raises(InputError, match="of 2 rows, but 2 of 1 rows are given"):
        model.run(Inputs(TOKENS[:1, :2]), plan, memory=memory)
    with pytest.raises(InputError, match="room is 17, expected 1 to model.max_length, 16"):
        model.memory(plan, batch=2, room=17)
    with pytest.raises(InputError, match="a memory needs integrator='scan'"):
        model.memory(model.plan(steps=2, integrator="diffrax"), batch=2, room=4)
    encoder = make_model(kind="encoder")
    with pytest.raises(InputError, match="a memory is of a decoder"):
        encoder.run(Inputs(TOKENS[:, :2]), plan, memory=memory)

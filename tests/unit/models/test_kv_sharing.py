"""Keys and values that neighbouring times share, against a loop that hands them on itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import ode
from odelm.errors import InputError
from odelm.evals.candidates import equal_steps
from odelm.infer.generator import Generator
from odelm.infer.room import bytes_a_place
from odelm.interop.convert import unrolled
from odelm.interop.family import common_obstacles
from odelm.models import Inputs
from odelm.models.along_depth import norms_along_depth
from odelm.models.early_exit import EarlyExit
from odelm.models.exit_pass import encode_with_exits
from odelm.models.kv_sharing import kept_times, sharing_of
from odelm.models.ranges import input_ranges
from odelm.train.start import inherit_options
from tests.calls import compiled, jitted
from tests.thorough import few

ATOL = 3 * 200 * 6e-8
ROWS = np.random.default_rng(0).integers(0, 13, (3, 9)).astype(np.int32)
MODELS = {
    "pre": dict(),
    "post, groups": dict(norm_placement="post", groups=2, depth=8),
    "ends": dict(depth=8, prelude=1, coda=1, positions="learned", layer_rank=2),
    "chain": dict(inner_blocks=2, wide_modulation=True),
    "lanes, fewer heads": dict(lanes=2, heads=4, kv_heads=2),
    "encoder": dict(kind="encoder", norm_placement="post", positions="learned"),
}


class Profiled(NamedTuple):
    """As `odelm.profile.Profile`, what `Generator` reads of it."""

    grid: tuple[float, ...]
    solver: str


class HandedOn:
    """A slot that keeps what one evaluation computes for those after it."""

    def __init__(self, keys=None, values=None):
        self.keys, self.values = keys, values

    def exchanged(self, keys, values, start, *, alone):
        assert start is None and alone
        keys, values = (keys, values) if self.keys is None else (self.keys, self.values)
        return keys, values, HandedOn(keys, values)


def by_hand(model, grid, span):
    """Returns hidden states of ROWS; a new slot is begun at each whole multiple of the span within a group."""
    config, view = model.config, None
    h = model._start(Inputs(ROWS), None)
    share = config.core // config.groups
    none = HandedOn() if config.inner_blocks == 1 else tuple(HandedOn() for _ in range(config.inner_blocks))
    for number, block in enumerate([*model.prelude, *model.blocks, *model.coda]):
        group = number - config.prelude
        core = 0 <= group < config.groups
        start, end = (group * share, (group + 1) * share) if core else (0, 1)
        times = [t for t in (grid if core else [0, 1]) if start <= t <= end]
        h, slots, begun = model._into_lanes(h, number), none, None
        for before, after in zip(times, times[1:], strict=False):
            cell = int((before - start) // span)
            if not core or cell != begun:
                slots, begun = none, cell
            condition = block.condition(jnp.float32(before))
            h, slots = block.step(condition=condition, h=h, dt=jnp.float32(after - before), view=view, memory=slots)
        h = model._out_of_lanes(h, number)
    return model._end(h)


CASES = {f"{name}, {span}": (options, span) for name, options in MODELS.items() for span in (2, 3)}


@pytest.mark.parametrize("options, span", few(CASES, "ends, 2"))
def test_the_first_of_a_span_computes_what_the_others_read(options, span, make_model):
    model = make_model(**{"depth": 6, **options}, kv_span=span)
    core = model.config.core
    uneven = sorted({0, 0.5, *range(1, core // 2 + 1), core - 0.5, core})
    for grid in (list(range(core + 1)), uneven):
        found = compiled(model.encode)(ROWS, grid=grid)
        np.testing.assert_allclose(found, jitted(lambda m, grid=grid: by_hand(m, grid, span), model), rtol=0, atol=ATOL)
    plain = make_model(**{"depth": 6, **options})
    assert np.abs(found - compiled(plain.encode)(ROWS, grid=grid)).max() > 1e-3


@pytest.mark.thorough
def test_gradients_are_those_of_the_loop(make_model):
    model = make_model(depth=6, kv_span=2, prelude=1, coda=1)
    weights = np.random.default_rng(1).standard_normal((3, 9, 16)).astype(np.float32)
    graph, state = nnx.split(model)

    def gradient(run):
        return jax.jit(jax.grad(lambda state: (run(nnx.merge(graph, state)) * weights).sum()))(state)

    expected = gradient(lambda model: by_hand(model, list(range(5)), 2))
    for options in (dict(), dict(remat="nothing_saveable"), dict(unroll=True)):
        found = gradient(lambda m, options=options: m.encode(ROWS, plan=m.plan(**options)))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("options", few({k: v for k, v in MODELS.items() if k != "encoder"}))
def test_a_memory_of_the_first_positions_gives_the_rest(options, make_model):
    model = make_model(**{"depth": 6, **options}, kv_span=2)
    for steps in (model.config.core, 2):
        plan = model.plan(steps=steps)

        def run(model, plan=plan):
            memory, parts = model.memory(plan, batch=3, room=9), []
            for part in (slice(4), slice(4, 5), slice(5, 9)):
                hidden, memory = model.run(Inputs(ROWS[:, part]), plan, memory=memory)
                parts.append(hidden)
            return jnp.concatenate(parts, axis=1)

        np.testing.assert_allclose(jitted(run, model), compiled(model.encode)(ROWS, plan=plan), rtol=0, atol=ATOL)


@pytest.mark.thorough
def test_spans_are_of_time_from_where_a_group_begins(make_model):
    model = make_model(depth=12, groups=2, kv_span=4)
    first, second = model.plan(grid=[0, 1, 2, 3, 5, 6, 6.1, 9.9, 10, 11, 12])
    of_first, of_second = (sharing_of(part, 4) for part in (first, second))
    assert of_first.fresh.tolist() == [True, False, False, False, True]
    assert of_second.slots.tolist() == [0, 0, 0, 1, 1]
    assert kept_times(second, model.config).ravel().tolist() == [6, 10]
    (coarse, _) = model.plan(steps=4)
    assert sharing_of(coarse, 4).fresh.tolist() == [True, False], "steps of 3 begin at 0 and 3"
    assert kept_times(coarse, model.config).ravel().tolist() == [0, np.inf]
    assert sharing_of(coarse, 4, carried=True).slots.tolist() == [0, 0]
    # Times that rounding moves: 30 steps of 0.1 begin at 0, 0.1, ... in float32.
    third = ode.make_plan(lambda t, h: h, np.arange(31) * 0.1)
    assert sharing_of(third, 1).slots.tolist() == [i // 10 for i in range(30)]


def test_a_memory_is_smaller_by_the_span(make_model):
    full, shared, coarse = (make_model(depth=12, kv_span=span) for span in (1, 4, 1))
    plans = full.plan(), shared.plan(), coarse.plan(steps=3)
    sizes = [bytes_a_place(model, plan) for model, plan in zip((full, shared, coarse), plans, strict=True)]
    assert sizes[1] == sizes[2] and (sizes[0] - 5) == 4 * (sizes[1] - 5), "5 bytes are the place's own"


def test_at_steps_of_a_span_nothing_is_shared(make_model):
    shared, plain = (make_model(depth=6, kv_span=span) for span in (2, 1))
    found = compiled(shared)(ROWS, steps=3)
    np.testing.assert_allclose(found, compiled(plain)(ROWS, steps=3), rtol=0, atol=ATOL)


@pytest.mark.thorough
def test_texts_of_two_grids_and_of_drafts(make_model, randomise):
    """The coarse times are those that full depth keeps keys at, so that drafts read them as they are."""
    model = randomise(make_model(depth=6, kv_span=2, max_length=32, tie_readout=False, dtype="float32"), scale=0.5)
    prompts = [[3, 1, 4], [5], [9, 2, 6, 5]]
    exact = Generator(model)(prompts, new_tokens=10)
    drafting = Generator(model, draft_steps=3, draft_length=3)
    assert drafting(prompts, new_tokens=10) == exact and drafting.draft_counts.accepted > 0
    plan, coarse = model.plan(), model.plan(steps=3)
    mixed = Generator(model, steps=3, prefill_steps=6)(prompts[:1], new_tokens=2, logprobs=True)[0]
    assert [times.shape for times in model.memory_times(plan)] == [times.shape for times in model.memory_times(coarse)]
    _, memory = model.run(Inputs(np.array(prompts[:1])), plan, memory=model.memory(plan, batch=1, room=5))
    hidden, _ = model.run(Inputs(np.array([[mixed.tokens[0]]])), coarse, memory=memory)
    assert mixed.tokens[1] == int(model.readout(hidden).argmax())


@pytest.mark.thorough
def test_what_is_measured_along_the_depth_is_of_the_model(make_model):
    model = make_model(depth=4, kv_span=2)
    h = [model._start(Inputs(ROWS), None)]
    for count in range(1, 5):
        # The state after so many units: its spans are those of the whole depth.
        part = model.blocks[0]
        slots, state = HandedOn(), h[0]
        for t in range(count):
            slots = HandedOn() if t % 2 == 0 else slots
            state, slots = part.step(condition=part.condition(jnp.float32(t)), h=state, dt=1.0, memory=slots)
        h.append(state)
    states, slopes = compiled_norms(model)
    np.testing.assert_allclose(states, [np.sqrt(np.square(x).mean()) for x in h[:4]], rtol=1e-5)
    moved = [np.sqrt(np.square(b - a).mean()) for a, b in zip(h, h[1:], strict=False)]
    np.testing.assert_allclose(slopes, moved, rtol=1e-4)
    ranges = jitted(lambda model: input_ranges(model, Inputs(ROWS), model.plan()), model)
    last = np.abs(h[3] / np.sqrt(np.square(h[3]).mean(-1, keepdims=True) + 1e-6)).max()
    condition = model.blocks[0].condition(jnp.float32(3)).norm1
    normed = model.blocks[0].norm1(h[3], affine=condition)
    assert last > 0 and np.isclose(ranges["blocks/0/attention/qkv"][3, 0], np.abs(normed).max(), rtol=1e-4)


def compiled_norms(model):
    return jitted(lambda model: norms_along_depth(model, Inputs(ROWS)), model)


def test_what_does_not_go_with_it_is_refused(make_model, make_config):
    model = make_model(depth=6, kv_span=2)
    for options in (dict(solver="heun"), dict(integrator="diffrax")):
        with pytest.raises(InputError, match="kv_span is 2: keys and values are shared by Euler's steps"):
            model.plan(**options)
    with pytest.raises(InputError, match="none of a tolerance"):
        model.encode_adaptive(ROWS, tolerance=0.1)
    with pytest.raises(InputError, match="early exits need keys and values of every time"):
        encode_with_exits(model, Inputs(ROWS), model.plan(), EarlyExit(0.1))
    with pytest.raises(InputError, match="model.kv_span is 0"):
        make_config(kv_span=0).validate()
    assert any("kv_span=2" in found for found in common_obstacles(model.config))
    assert odelm.ModelConfig().kv_span == 1


def test_a_last_step_of_any_size_begins_no_span(make_model):
    """There is no room for one: a memory has so many slots as there are spans."""
    model = make_model(depth=6, kv_span=3)
    plan = model.plan(grid=[0, 1, 2, 3, 4, 5, 5.9999, 6])
    assert sharing_of(plan[0], 3).slots.tolist() == [0, 0, 0, 1, 1, 1, 1]

    def run(model):
        memory = model.memory(plan, batch=3, room=9)
        first, memory = model.run(Inputs(ROWS[:, :4]), plan, memory=memory)
        return jnp.concatenate([first, model.run(Inputs(ROWS[:, 4:]), plan, memory=memory)[0]], axis=1)

    np.testing.assert_allclose(jitted(run, model), compiled(model.encode)(ROWS, plan=plan), rtol=0, atol=ATOL)


def test_another_span_is_given_to_an_existing_model(make_model, make_config, randomise):
    model = randomise(make_model(depth=6, kv_span=2, max_length=32, tie_readout=False), scale=0.5)
    with pytest.raises(InputError, match="kv_span is 2, but separate layers each have"):
        unrolled(model)
    assert inherit_options(make_config(kv_span=4), model.config).kv_span == 4
    model.profile = Profiled((0.0, 1.0, 6.0), "heun")
    generator = Generator(model, kv_span=3)
    assert generator.runner.model.config.kv_span == 3 and len(generator.plan[0].sizes) == 6, "no promise holds for it"
    assert len(Generator(model, kv_span=2, steps=3).plan[0].sizes) == 3
    assert {setting.solver for setting in equal_steps(model.config)} == {"euler"}


def test_a_mesh_of_explicit_axes_is_refused(make_model):
    model, plain = make_model(depth=6, kv_span=2), make_model(depth=6)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows = jax.device_put(ROWS, jax.NamedSharding(mesh, jax.P("data")))
        with pytest.raises(InputError, match=r"shared \(model.kv_span\) need a mesh whose axes are Auto"):
            model(rows)
        with pytest.raises(InputError, match="early exits need a mesh whose axes are Auto"):
            encode_with_exits(plain, Inputs(rows), plain.plan(), EarlyExit(0.1))

"""What programs load into the L2 cache ahead, what they copy, and what they read in one round."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from odelm.models.kernels import choice, chunks
from odelm.models.kernels.layout import Layout
from odelm.models.kernels.layout_choice import layout_of
from odelm.models.kernels.marked import loop_text
from odelm.models.kernels.program import Program
from odelm.models.kernels.tokens import Token


def program_of(layout: Layout, me: Any, **arrays: Any) -> Program:
    given = dict(matrices={}, vectors={}, between={}, keys=None, values=None, near={}) | arrays
    return Program(layout=layout, me=me, meeting=True, **given)


def layout_for(make_model, **options: Any) -> Layout:
    model = make_model(width=256, heads=4, depth=2, vocab_size=2000, parallel_branches=True)
    return layout_of(model.config, model.plan(steps=2), **dict(room=300, programs=5) | options)


@pytest.fixture
def loaded(monkeypatch):
    """Returns a function that returns how often each program loads each number of the keys ahead in step 1, given a
    layout and the place of its row; the same for the values."""

    def add_one(*refs: Any) -> None:
        for ref in refs:
            ref[...] += 1

    monkeypatch.setattr(chunks, "load_ahead", add_one)

    def run(layout: Layout, place: int) -> np.ndarray:
        shape = layout.steps, 1, layout.room, layout.kv_heads * layout.head_size

        @jax.jit
        def load(me: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys, values = (jax.new_ref(jnp.zeros(shape, jnp.int32)) for _ in range(2))
            token = Token(*map(jnp.int32, (1, place, place, 0)))
            chunks.load_memory_ahead(program_of(layout, me, keys=keys, values=values), token, jnp.int32(1))
            return jax.freeze(keys), jax.freeze(values)

        found = np.zeros((layout.programs, *shape), np.int32)
        for me in range(layout.programs):
            keys, values = load(jnp.int32(me))
            np.testing.assert_array_equal(keys, values)
            found[me] = keys
        return found

    return run


@pytest.mark.parametrize("place", [8, 130, 300])
@pytest.mark.parametrize("room", [24_000_000, 250_000])
def test_what_is_not_copied_at_once_is_loaded_ahead_where_there_is_room(make_model, monkeypatch, loaded, place, room):
    layout = layout_for(make_model, programs=4)
    assert (layout.chunk_splits, layout.chunk_places, layout.attended) == (1, 1, 4)
    monkeypatch.setattr(chunks, "AHEAD_BYTES", room)
    most = room // (4 * 2 * 64 * 64 * 2)  # parts, keys and values, places, head size, bytes
    assert most == 3 if room < 1_000_000 else most > 5
    found = loaded(layout, place).sum(0)
    assert not found[0].any(), "another step"
    expected = np.zeros(layout.room, np.int32)
    expected[64 : min(-(-place // 64), most) * 64] = 1
    np.testing.assert_array_equal(found[1, 0], np.repeat(expected[:, None], 256, 1))


def test_the_programs_of_a_head_load_their_own_chunks_ahead(make_model, loaded):
    layout = layout_for(make_model, programs=8)
    assert (layout.chunk_splits, layout.chunk_places) == (2, 1)
    each = loaded(layout, 300)[:, 1, 0]
    assert not each[:, :128].any() and (each[:, 128:].sum(0) == 1).all() and each.shape[1] == 320
    for me, found in enumerate(each):
        assert set(np.flatnonzero(found.any(1)) // 64) == ({2, 4} if me % 2 == 0 else {3})


def test_nothing_is_loaded_ahead_that_is_copied_at_once_or_of_several_rows_or_by_a_program_alone(
    make_model, monkeypatch
):
    monkeypatch.setattr(chunks, "load_ahead", lambda *refs: pytest.fail("loaded ahead"))
    token = Token(*map(jnp.int32, (1, 100, 100, 0)))
    for options in (dict(room=120, programs=8), dict(rows=3), dict(programs=1)):
        layout = layout_for(make_model, **options)
        chunks.load_memory_ahead(program_of(layout, jnp.int32(0)), token, jnp.int32(0))


def test_a_program_copies_every_piece_of_its_readout_once_and_in_order(make_model, monkeypatch):
    layout, copied = layout_for(make_model, readout_bits=16, by_warps=False, ring=5, ring_slice=64), []
    monkeypatch.setattr(choice, "_fetch", lambda program, piece: copied.append(int(piece)))
    monkeypatch.setattr(choice.pl, "when", lambda condition: lambda body: body() if condition else None)
    for name in ("barrier_wait", "wgmma", "wgmma_wait"):
        monkeypatch.setattr(plgpu, name, lambda *args: None)

    class Anything:
        at = property(lambda self: self)
        __getitem__ = transpose = lambda self, *args: self

    near = dict.fromkeys(("readout", "readout_arrival"), Anything())
    for me in range(layout.programs):
        copied.clear()
        program = program_of(layout, jnp.int32(me), near=near)
        choice.send_for_readout(program, early=True)
        choice.send_for_readout(program, early=False)
        for tile in range(int(choice.tiles(program))):
            choice.add_pieces(program, jnp.int32(tile), None, Anything())
        tiles = len(range(me, layout.vocabulary // 64, layout.programs))
        assert copied == list(range(tiles * layout.width // layout.ring_slice)) and len(copied) > 2 * layout.ring


@pytest.mark.parametrize("together", [False, True])
def test_vectors_that_are_read_together_take_one_round(together):
    lines = loop_text(3, 4, 2, 32, outputs=24, together=together).splitlines()
    ends = [i for i, line in enumerate(lines) if " bra " in line]
    rounds = [[line for line in lines[a:b] if "ld.relaxed" in line] for a, b in zip([0, *ends], ends, strict=False)]
    assert [len(some) for some in rounds] == ([12] if together else [4, 8])
    assert len({line for some in rounds for line in some}) == 12
    assert sum(line.count("or.b32 all") for line in lines) == 24

"""What programs load into the L2 cache ahead: data that they copy later, and all of it where there is room."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from odelm.models.kernels import ahead, choice, chunks
from odelm.models.kernels.layout import Layout
from odelm.models.kernels.layout_choice import layout_of
from odelm.models.kernels.marked import loop_text
from odelm.models.kernels.program import Program
from odelm.models.kernels.tokens import TEXTS, Token, Tokens


def program_of(layout: Layout, me: Any, **arrays: Any) -> Program:
    given = dict(matrices={}, vectors={}, between={}, keys=None, values=None, near={}) | arrays
    return Program(layout=layout, me=me, meeting=True, **given)


def layout_for(make_model, **options: Any) -> Layout:
    model = make_model(width=256, heads=4, depth=2, vocab_size=2000, parallel_branches=True)
    return layout_of(model.config, model.plan(steps=2), **dict(room=300, programs=5) | options)


@pytest.fixture
def loaded(monkeypatch):
    """Returns a function that returns how often each number of the keys is loaded ahead in step 1, given a layout and
    each row's place; the same for the values."""

    def add_one(*refs: Any) -> None:
        for ref in refs:
            ref[...] += 1

    monkeypatch.setattr(chunks, "load_places_ahead", add_one)

    def run(layout: Layout, kept: tuple[int, ...]) -> np.ndarray:
        places = jnp.array(kept) - 7
        texts = jnp.zeros((len(TEXTS), layout.columns), jnp.int32).at[TEXTS.index("place"), : layout.rows].set(places)
        shape = layout.steps, layout.rows, layout.room, layout.kv_heads * layout.head_size

        @jax.jit
        def load(me: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys, values = (jax.new_ref(jnp.zeros(shape, jnp.int32)) for _ in range(2))
            token = Tokens(jax.new_ref(texts), jnp.int32(7))
            token = token if layout.several else token.of(0)
            chunks.load_part_ahead(program_of(layout, me, keys=keys, values=values), token, jnp.int32(1), number)
            return jax.freeze(keys), jax.freeze(values)

        found = np.zeros(shape, np.int32)
        for me in range(layout.programs):
            for number in range(-(-layout.attended // layout.programs) + 1):
                keys, values = load(jnp.int32(me), jnp.int32(number))
                np.testing.assert_array_equal(keys, values)
                found += keys
        return found

    return run


@pytest.mark.parametrize("kept", [(200, 200, 200), (8, 300, 130)], ids=str)
@pytest.mark.parametrize("room", [24_000_000, 500_000])
def test_the_chunks_of_a_step_are_loaded_ahead(make_model, monkeypatch, loaded, kept, room):
    """Of a step's first part, the first chunks are copied at once."""
    layout = layout_for(make_model, rows=3)
    assert layout.attended > chunks.AHEAD * layout.programs, "a program has more parts than are loaded at once"
    monkeypatch.setattr(chunks, "AHEAD_BYTES", room)
    found = loaded(layout, kept)
    assert not found[0].any(), "another step"
    most = room // (2 * 2 * layout.chunk * layout.head_size * chunks.AHEAD * layout.programs)
    assert most == 3 if room < 1_000_000 else most > 5
    heads = found[1].reshape(layout.rows, layout.room, layout.heads, layout.head_size)
    for row, head in np.ndindex(layout.rows, layout.heads):
        first = layout.chunk_places if row * layout.heads + head < layout.programs else 0
        expected = np.zeros(layout.room, np.int32)
        expected[first * layout.chunk : min(-(-kept[row] // layout.chunk), most) * layout.chunk] = 1
        np.testing.assert_array_equal(heads[row, :, head], np.repeat(expected[:, None], layout.head_size, 1))


def test_what_a_single_row_does_not_copy_at_once_is_loaded_ahead(make_model, loaded):
    layout = layout_for(make_model, programs=8)
    assert (layout.chunk_splits, layout.chunk_places) == (2, 1)
    found = loaded(layout, (300,))[1, 0]
    assert not found[:128].any() and (found[128:] == 1).all() and len(found) == 320


def test_nothing_is_loaded_ahead_that_is_copied_at_once_or_by_a_program_alone(make_model, monkeypatch):
    monkeypatch.setattr(chunks, "load_places_ahead", lambda *refs: pytest.fail("loaded ahead"))
    token = Token(*map(jnp.int32, (1, 100, 100, 0)))
    for layout in (layout_for(make_model, room=120, programs=8), layout_for(make_model, rows=3, programs=1)):
        chunks.load_memory_ahead(program_of(layout, jnp.int32(0)), token, jnp.int32(0))


def test_a_load_ahead_has_the_size_of_its_array():
    assert ahead.load_text(8192) == "@$1 cp.async.bulk.prefetch.L2.global [$0], 8192;"
    with pytest.raises(AssertionError):
        ahead.load_text(8200)


def test_pieces_of_the_readout_are_loaded_before_they_are_copied(make_model, monkeypatch):
    layout = layout_for(make_model, readout_bits=16, by_warps=False, ring=5, ring_slice=64)
    parts, events = layout.width // layout.ring_slice, []

    def record(kind: str, program: Program, piece: Any) -> None:
        if piece < choice._pieces(program):
            events.append((kind, int(piece)))

    monkeypatch.setattr(choice, "_fetch", lambda program, piece: record("copied", program, piece))
    monkeypatch.setattr(choice, "_load_ahead", lambda program, piece: record("loaded", program, piece))
    monkeypatch.setattr(choice.pl, "loop", lambda first, end: lambda body: [body(i) for i in range(first, end)])
    monkeypatch.setattr(choice.pl, "when", lambda condition: lambda body: body() if condition else None)
    for name in ("barrier_wait", "wgmma", "wgmma_wait"):
        monkeypatch.setattr(plgpu, name, lambda *args: None)

    class Anything:
        at = property(lambda self: self)
        __getitem__ = transpose = lambda self, *args: self

    near = dict.fromkeys(("readout", "readout_arrival"), Anything())
    for me in range(layout.programs):
        events.clear()
        program = program_of(layout, jnp.int32(me), near=near)
        choice.send_for_readout(program, early=True)
        choice.send_for_readout(program, early=False)
        for tile in range(int(choice.tiles(program))):
            choice.add_pieces(program, jnp.int32(tile), None, Anything())
        pieces = int(choice._pieces(program))
        assert pieces == parts * len(range(me, layout.vocabulary // 64, layout.programs)) > 2 * layout.ring
        assert [piece for kind, piece in events if kind == "copied"] == list(range(pieces))
        assert [piece for kind, piece in events if kind == "loaded"] == list(range(layout.ring, pieces))
        for piece in range(layout.ring, pieces):
            assert events.index(("loaded", piece)) < events.index(("copied", piece))


@pytest.mark.parametrize("together", [False, True])
def test_vectors_that_are_read_together_take_one_round(together):
    lines = loop_text(3, 4, 2, 32, outputs=24, together=together).splitlines()
    ends = [i for i, line in enumerate(lines) if " bra " in line]
    rounds = [[line for line in lines[a:b] if "ld.relaxed" in line] for a, b in zip([0, *ends], ends, strict=False)]
    assert [len(some) for some in rounds] == ([12] if together else [4, 8])
    assert len({line for some in rounds for line in some}) == 12
    assert sum(line.count("or.b32 all") for line in lines) == 24

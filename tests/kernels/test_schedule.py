"""Each program multiplies by the right pieces of the matrices, which are copied and waited for in time: the schedule of
copies, played for every program with places that only remember what they hold."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flax import nnx

import odelm
from odelm.errors import InputError
from odelm.models.kernels import choice, multiply, pieces
from odelm.models.kernels.layout import MAPS, ROWS, Layout
from odelm.models.kernels.layout_choice import layout_of
from odelm.models.kernels.multiply import Linear
from odelm.models.kernels.portions import kept, participants, portions
from odelm.models.kernels.program import Program


def layout_for(width: int, told: dict[str, Any], room: int = 768, **options: Any) -> tuple[Layout, int]:
    """Returns a layout and how many blocks the model has."""
    shape = dict(kind="decoder", depth=6, max_length=1024, **options)
    narrow = odelm.CausalLM(odelm.ModelConfig(vocab_size=64, width=64, heads=1, **shape), rngs=nnx.Rngs(0))
    blocks = len(narrow.prelude) + len(narrow.blocks) + len(narrow.coda)
    config = odelm.ModelConfig(vocab_size=50_304, width=width, heads=width // 64, **shape)
    return layout_of(config, narrow.plan(steps=4), room, **told), blocks


PARALLEL = dict(parallel_branches=True)
CASES = {
    "small": (768, {}, {}),
    "medium": (1024, {}, {}),
    "medium, not halved": (1024, dict(halved=False), {}),
    "medium, readout of 16 bits": (1024, dict(readout_bits=16), {}),
    "small, 4 rows": (768, dict(rows=4), {}),
    "one head of keys and values": (1024, {}, dict(kv_heads=1)),
    "ends": (768, {}, dict(prelude=1, coda=1)),
    "groups, wide": (1024, {}, dict(groups=2)),
    "matrices of 8 bits": (1536, dict(block_bits=8), {}),
}


class Places:
    """An array whose first axis is places, or a matrix of which some rows and columns are copied."""

    def __init__(self, name: str, shape: tuple[int, ...] = ()):
        self.name, self.shape, self.at = name, shape, self

    def __getitem__(self, index: Any) -> Any:
        if self.name in MAPS:
            block, rows, columns = index
            return self.name, int(block), int(rows[0]), int(columns[0])
        return SimpleNamespace(of=(self.name, int(index)), shape=self.shape)


class Played:
    """One program: what its places hold, and which copies are on their way."""

    def __init__(self, layout: Layout, blocks: int, me: int):
        size = layout.width // layout.matrix_places
        near = dict(matrix=Places("matrix", (ROWS, size)), out=Places("its out", (ROWS, layout.out_slice)), pairs=None)
        near |= dict(arrivals=Places("arrivals"), readout=Places("readout", (ROWS, layout.ring_slice)))
        vectors = {"block": np.arange(layout.steps) % blocks}
        matrices = {name: Places(name) for name in MAPS}
        matrices["qkv"].shape = (blocks,)
        self.program = Program(
            layout, me, matrices=matrices, vectors=vectors, between={}, keys=None, values=None, near=near,
            meeting=True,
        )  # fmt: skip
        self.layout, self.held, self.coming, self.done = layout, {}, {}, []
        self.fetched: list[int] = []

    def copy(self, what: Any, place: Any, arrival: Any) -> None:
        assert arrival.of not in self.coming, "a barrier counts one copy at a time"
        assert place.of not in [of for of, _ in self.coming.values()]
        self.held[place.of] = None
        self.coming[arrival.of] = place.of, what

    def wait(self, arrival: Any) -> None:
        place, what = self.coming.pop(arrival.of)
        self.held[place] = what

    def fetch_of_readout(self, program: Program, piece: Any) -> None:
        """A piece of the readout overwrites what has the memory of its place."""
        self.fetched.append(int(piece))
        slot = int(choice._slot(program, piece))
        if slot < self.layout.out_places:
            overwritten = ("its out", 0) if self.layout.rounded else ("readout", slot)
            assert overwritten not in [of for of, _ in self.coming.values()]
            self.held[overwritten] = None

    def products(self, step: int) -> None:
        """Multiplies by all pieces, of which each has to be the right one."""

        def store(name: str, tile: Any, part: Any, held: list[Any]) -> None:
            size, splits = self.layout.slice_of(name), len(held)
            first = int(part) * size
            block = int(self.program.vectors["block"][step])
            expected = [(name, block, int(tile) * ROWS, first + i * size // splits) for i in range(splits)]
            assert held == expected, f"step {step}"
            self.done.append((name, int(tile), int(part)))

        for name in MAPS:
            of = Linear(name, np.int32(step), lambda tile: (), lambda: None, lambda offset, size: None,
                        lambda *given, name=name: store(name, *given))  # fmt: skip
            multiply.multiply(self.program, of)


@pytest.fixture
def played(monkeypatch):
    """Returns a function that plays one program, whose loops and conditions are Python's."""
    current: list[Played] = []

    def cond(condition: Any, yes: Any, no: Any) -> Any:
        return yes() if condition else no()

    def loop(start: int, stop: int) -> Any:
        return lambda body: [body(np.int32(i)) for i in range(start, stop)]

    def when(condition: Any) -> Any:
        return lambda body: body() if condition else None

    def product(places: list[Any], pairs: Any, inputs: int) -> list[Any]:
        del pairs
        assert sum(place.shape[1] for place in places) == inputs
        return [current[0].held[place.of] for place in places]

    def by_the_warpgroup(self: Any, name: str, acc: Any, inputs: Any, number: Any = 0, portion: int = 0) -> list[Any]:
        del acc, inputs
        return [current[0].held[place.of] for place, _ in self._places(name, number, portion)]

    python = SimpleNamespace(when=when, loop=loop, ds=lambda start, size: (start, size), cdiv=lambda a, b: -(-a // b))
    fake = SimpleNamespace(
        copy_gmem_to_smem=lambda *given: current[0].copy(*given), commit_smem=lambda: None,
        barrier_wait=lambda arrival: current[0].wait(arrival),
    )  # fmt: skip
    for module in (pieces, multiply, choice):
        monkeypatch.setattr(module, "lax", SimpleNamespace(cond=cond, rem=np.remainder))
        monkeypatch.setattr(module, "jnp", np)
        monkeypatch.setattr(module, "pl", python)
        monkeypatch.setattr(module, "plgpu", fake)
    monkeypatch.setattr(pieces, "product", product)
    monkeypatch.setattr(pieces.Pieces, "scale", lambda *given: None)
    monkeypatch.setattr(multiply, "meet_warps", lambda: None)
    monkeypatch.setattr(choice, "_fetch", lambda program, piece: current[0].fetch_of_readout(program, piece))
    monkeypatch.setattr(pieces.Pieces, "multiply", by_the_warpgroup)
    monkeypatch.setattr(Program, "product", lambda program, accumulate: accumulate(None))
    monkeypatch.setattr(Program, "inputs", lambda program, size: None)

    def run(layout: Layout, blocks: int, me: int, tokens: int) -> Played:
        current[:] = [Played(layout, blocks, me)]
        (one,) = current
        multiply.begin_copies(one.program)
        for token in range(tokens):
            choice.send_for_readout(one.program, early=True)
            for step in range(layout.steps):
                one.products(step)
            choice.send_for_readout(one.program, early=False)
            assert one.fetched == list(range(layout.ring)) * (token + 1)
            one.program.pieces.fetch_for_token()
        one.program.pieces.drain()
        assert not one.coming
        return one

    return run


@pytest.mark.parametrize("case", CASES)
def test_every_program_multiplies_by_its_pieces_at_every_step_and_they_are_all_pieces(played, case):
    width, told, options = CASES[case]
    layout, blocks = layout_for(width, told, **options)
    assert layout.fits and layout.halved == (case in ("medium", "one head of keys and values"))
    done, tokens = [], 2
    for me in range(layout.programs):
        done += played(layout, blocks, me, tokens).done
    splits = {name: layout.splits(name) for name in MAPS}
    every = {(name, *divmod(n, splits[name])) for name in MAPS for n in range(layout.pieces(name))}
    assert Counter(done) == dict.fromkeys(every, tokens * layout.steps)


def test_a_halved_layout_has_a_place_for_every_piece():
    layout, _ = layout_for(1024, {})
    assert [layout.pieces(name) for name in MAPS] == [48, 32, 64, 128]
    assert (layout.programs, participants(layout, "qkv", "up"), participants(layout, "out", "down")) == (132, 112, 132)
    held = Counter(of.owner(n) for of in portions(layout, "down") if of.kept for n in range(of.pieces))
    assert set(held) == set(range(112, 132)) and max(held.values()) == 2 and held.total() == 28


@pytest.mark.parametrize(
    ("width", "told", "options"),
    [
        (768, {}, {}),
        (1024, dict(readout_bits=16), {}),
        (1024, dict(rows=2), {}),
        (1024, {}, dict(prelude=1)),
        (1024, dict(block_bits=8), {}),
        (1024, dict(sampled=True, filtered=True), {}),
        (1024, dict(out_slice=256), {}),
    ],
)
def test_what_cannot_be_halved_is_refused(width, told, options):
    with pytest.raises(InputError, match="a layout is halved only for one row"):
        layout_for(width, told | dict(halved=True), **options)
    assert not layout_for(width, told, **options)[0].halved


def test_a_halved_layout_for_which_there_is_no_room_is_refused():
    with pytest.raises(InputError, match="a halved layout takes .* bytes of shared memory, too many"):
        layout_for(1024, dict(halved=True, ring=3))
    assert not layout_for(1024, dict(ring=3))[0].halved


def test_programs_with_more_pieces_of_down_have_no_part_in_attention_where_branches_are_parallel():
    one_head = dict(kv_heads=1)
    for options, more, splits in (({}, 20, 8), (PARALLEL, 20, 4), (one_head, 28, 8), (PARALLEL | one_head, 28, 4)):
        layout, _ = layout_for(1024, {}, room=512, **options)
        assert (kept(layout), layout.chunk_splits, layout.attended) == (more, splits, 16 * splits)
        assert "parallel_branches" not in options or layout.attended <= layout.programs - more

"""How a model's matrices are shared out among the programs of a kernel, and which models a kernel takes."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from odelm.config import ModelConfig
from odelm.models.transformer import DepthPlan, SharedTransformer

ROWS = 64
"""Rows of a matrix that a program multiplies at a time: those of a Hopper tensor core's instruction."""
COLUMNS = 8
"""Columns of the other factor, the fewest of that instruction. For one row of the batch all are equal. In shared memory
each is a row: where inputs come first there, 16 columns are needed, and matrices are copied by 32 bytes, not 128."""
SLICE, RING_SLICES = 512, (128, 64)
"""The most inputs of a matrix that a program sums over at a time, in the blocks, and how many in the readout."""
MAPS = ("qkv", "out", "up", "down")
"""The linear maps of a block."""
CHUNK = 64
"""Positions whose keys a program reads at a time."""
PROGRAMS = 132
"""Multiprocessors of an H100 or H200: all programs have to run at once, since they wait for each other."""
SHARED_BYTES, SPARE_BYTES = 232_448, 6_144
"""Shared memory that a program of a Hopper card may have, and what of it is left for reductions and barriers."""
RINGS = (6, 5, 4, 3, 2)
"""How many pieces of the readout may be on their way or in use; as many as there is shared memory for."""


@dataclass(frozen=True)
class Layout:
    """The sizes of a kernel, fixed when it is compiled. D, H, J, K, F, V as in `ModelConfig`."""

    width: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    vocabulary: int
    """V, a multiple of `ROWS`: the readout's rows may be filled up."""
    words: int
    """How many of them are tokens."""
    room: int
    """S, places of the memory, a multiple of `chunk`."""
    steps: int
    """N, evaluations of blocks."""
    norm: str
    eps: float
    activation: str
    parallel: bool
    rotary: bool
    qk_norm: bool
    sampled: bool = False
    """Whether a token is drawn by its probability, at a temperature; otherwise it is the likeliest."""
    dtype: Any = jnp.bfloat16
    """Of the matrices and of the keys and values."""
    programs: int = PROGRAMS
    slices: tuple[int, int, int, int] = (SLICE, SLICE, SLICE, SLICE)
    """Inputs of each of `MAPS` that are summed over at a time: the sums of a row's slices are added by those who read
    them."""
    sharing: bool = True
    """Whether every other map takes the place in shared memory of the one before it; if not, each has its own."""
    chunk: int = CHUNK
    chunk_splits: int = 8
    """How many programs share the positions of a head."""
    ring: int = 2
    """Pieces of the readout that are on their way or in use."""
    ring_slice: int = RING_SLICES[-1]

    @property
    def mapped_heads(self) -> int:
        """Heads of queries, keys and values."""
        return self.heads + 2 * self.kv_heads

    @property
    def maps(self) -> tuple[str, str, str, str]:
        """The linear maps of a block, in the order in which a step applies them."""
        return ("qkv", "up", "out", "down") if self.parallel else ("qkv", "out", "up", "down")

    @property
    def up(self) -> int:
        """What the first feed-forward matrix gives."""
        return self.hidden * (2 if self.activation == "swiglu" else 1)

    def slice_of(self, name: str) -> int:
        """Returns how many inputs of a map are summed over at a time."""
        return self.slices[MAPS.index(name)]

    def inputs(self, name: str) -> int:
        """Returns how many inputs a map has."""
        return {"qkv": self.width, "out": self.heads * self.head_size, "up": self.width, "down": self.hidden}[name]

    def splits(self, name: str) -> int:
        """Returns in how many slices the inputs of a map are cut."""
        return self.inputs(name) // self.slice_of(name)

    def pieces(self, name: str) -> int:
        """Returns how many pieces of `ROWS` by a slice a map has."""
        rows = {"qkv": self.mapped_heads * self.head_size, "out": self.width, "up": self.up, "down": self.width}
        return rows[name] // ROWS * self.splits(name)

    def rounds(self, name: str) -> int:
        """Returns how many pieces of a map a program has at most."""
        return -(-self.pieces(name) // self.programs)

    @property
    def places(self) -> tuple[tuple[str, ...], ...]:
        """The maps that take turns with each place in shared memory."""
        order = self.maps
        return ((order[0], order[2]), (order[1], order[3])) if self.sharing else tuple((name,) for name in order)

    def place_shape(self, names: tuple[str, ...]) -> tuple[int, int, int]:
        """Returns the shape of a place for the pieces of maps whose slices are equal: rounds, rows, inputs."""
        return max(map(self.rounds, names)), ROWS, self.slice_of(names[0])

    @property
    def shared_bytes(self) -> int:
        """What a program takes of shared memory, but for reductions and barriers."""
        numbers = max(self.width, *self.slices) * COLUMNS + 2 * self.chunk * self.head_size
        numbers += self.ring * ROWS * self.ring_slice + sum(math.prod(self.place_shape(names)) for names in self.places)
        return numbers * jnp.dtype(self.dtype).itemsize + self.width * 4

    @property
    def fits(self) -> bool:
        """Whether a Hopper card has so much."""
        return self.shared_bytes + SPARE_BYTES <= SHARED_BYTES

    @property
    def slots(self) -> int:
        """Numbers kept for each program, a multiple of the threads of a warpgroup."""
        return -(-self.programs // 128) * 128


def layout_of(config: ModelConfig, plan: DepthPlan, room: int, **options: Any) -> Layout:
    """Returns the layout of a model that `unsupported` finds nothing in; `room` is that of the memory at least.

    Each map has a place of its own, with slices as short as they can be for every program to have one piece, if the
    shared memory of a Hopper card allows it; if not, maps share places. The readout gets what is left. `options` are
    fields of the layout, which are not chosen then; with `slices` among them nothing is.
    """
    chunk, D, F = options.get("chunk", CHUNK), config.width, config.feedforward_size
    layout = Layout(
        width=D, heads=config.heads, kv_heads=config.key_value_heads, head_size=config.head_size, hidden=F,
        vocabulary=-(-config.vocab_size // ROWS) * ROWS, words=config.vocab_size, room=-(-room // chunk) * chunk,
        steps=sum(part.times.shape[0] for part in plan), norm=config.norm, eps=config.norm_eps,
        activation=config.activation, parallel=config.parallel_branches, rotary=config.positions == "rotary",
        qk_norm=config.qk_norm, **options,
    )  # fmt: skip
    if "slices" in options:
        return layout
    shared = max(_divisors(math.gcd(D, config.heads * config.head_size, F)))
    choices = [dict(slices=tuple(_shortest(layout, name) for name in MAPS), sharing=False)]
    choices.append(dict(slices=(shared,) * 4, sharing=True))
    choices = [one for one in choices if one["sharing"] == options.get("sharing", one["sharing"])]
    rings = [dict(ring=ring, ring_slice=size) for size in RING_SLICES if D % size == 0 for ring in RINGS]
    all_of = [dataclasses.replace(layout, **places | ring | options) for places in choices for ring in rings]
    return next((one for one in all_of if one.fits), all_of[-1])


def _shortest(layout: Layout, name: str) -> int:
    """Returns the shortest slice of a map with which no program has two pieces, or the longest of all."""
    lengths = _divisors(layout.inputs(name))
    layouts = [dataclasses.replace(layout, slices=(length,) * 4) for length in lengths]
    return next((one.slices[0] for one in layouts if one.rounds(name) == 1), lengths[-1])


def _divisors(inputs: int) -> list[int]:
    """Returns the lengths of slices into which so many inputs can be cut."""
    return [n for n in range(ROWS, SLICE + 1, ROWS) if inputs % n == 0]


def unsupported(model: SharedTransformer, plan: DepthPlan) -> str | None:
    """Returns why no kernel takes a model along a plan, in a few words; None if one does."""
    config = model.config
    reasons = {
        "it is no decoder": config.kind != "decoder",
        "it is quantised": model.quantization is not None,
        "it is post-norm": config.norm_placement != "pre",
        "its state has lanes": config.lanes > 1,
        "its groups have inner blocks": config.inner_blocks > 1,
        "its layers have corrections of their own": config.layer_rank > 0,
        "its embedding is factorised": config.embed_dim is not None or config.embed_norm,
        "it shares keys and values along depth": config.kv_span > 1,
        "its tokens have types": bool(config.token_types),
        f"its heads are of {config.head_size}, no multiple of {ROWS}": config.head_size % ROWS != 0,
        f"its width is {config.width}, no multiple of 128": config.width % 128 != 0,
        f"its hidden units are {config.feedforward_size}, no multiple of {ROWS}": config.feedforward_size % ROWS != 0,
        "the solver takes several stages": any(part.times.shape[1] > 1 for part in plan),
        "the integrator is Diffrax's": any(part.solver is not None for part in plan),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)

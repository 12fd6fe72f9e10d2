"""How a model's matrices are divided among the programs of a kernel."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

ROWS = 64
"""Rows of a matrix that a program multiplies at a time: as many as a Hopper tensor core's instruction takes. A head has
as many numbers, so that the program that multiplies by its rows has all of it."""
COLUMNS = 8
"""Columns of the other factor, the fewest that the instruction takes: rows of the batch, or for one row all equal, or
parts of it in int8. More rows take as many columns more at a time. In shared memory each column is a row: with inputs
first there would be 16 columns, and matrices copied by 32 bytes, not 128."""
MOST_ROWS = 32
"""The most rows of the batch: a product's right side has that many columns in shared memory, beside a matrix."""
RING_SLICES = {16: (128, 64), 8: (384, 256, 128)}
"""Inputs of the readout's rows that a program multiplies at a time, in order of preference, by the bits of a row's
numbers."""
MAPS = ("qkv", "out", "up", "down")
"""The linear maps of a block."""
TURNS = "qkv", "up", "down"
"""The maps whose pieces have one place of a program's shared memory, in which they may take turns, in a step's order
(see `Layout.turns`). The piece of "out" has the memory of the readout's ring, which is free until the readout."""
THREADS = 128
"""Threads of a program: a vector is read and written fastest if each of them holds equally many of its numbers."""
CHUNK = 64
"""Positions whose keys a program reads at a time."""
PROGRAMS = 132
"""Multiprocessors of an H100 or H200: all programs have to run at once, since they wait for each other."""
SHARED_BYTES, SPARE_BYTES = 232_448, 6_144
"""Shared memory that a program of a Hopper card may have, and the part of it left for reductions and barriers."""
REDUCTION_BYTES = (8_192, 4_096, 2_048)
"""Sizes of the memory for reductions, of which a program has the first that fits; `SPARE_BYTES` has the last."""
PAIRED_ROWS = 5
"""From so many rows on, results are published by twos (`pairs`): 8 rows were faster, 4 slower than in another call."""
GATHERED = 264
"""Numbers of float32 in shared memory through which warps add up what they have of attention: 64 values of each of
four warps, and two more of each."""
RINGS = (8, 7, 6, 5, 4, 3, 2)
"""How many pieces of the readout may be in flight or in use; the most for which there is shared memory."""
WIDEST = {16: 1024, 8: 1536}
"""The widest state, by the bits of the blocks' matrices: a program keeps `ROWS` rows of that many inputs."""


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
    """How many of the readout's rows are tokens."""
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
    rows: int = 1
    """B, rows of the batch that are decoded at once, at most `MOST_ROWS`."""
    sampled: bool = False
    """Whether a token is drawn by its probability, at a temperature; otherwise it is the likeliest."""
    filtered: bool = False
    """Whether a token is drawn among the `top_k` likeliest ones; only where one launch computes all phases."""
    dtype: Any = jnp.bfloat16
    """The dtype of the matrices and of the keys and values."""
    programs: int = PROGRAMS
    out_slice: int = ROWS
    """Inputs of attention's output matrix that are summed over at a time; the other maps sum over as many as the state
    is wide. Where a map has more inputs, the programs that read the sums of its slices add them."""
    chunk: int = CHUNK
    chunk_splits: int = 8
    """How many programs share the positions of a head; every program with a piece of `out` reads all their averages."""
    chunk_places: int = 1
    """Chunks of keys and values that are in flight or in use, where there are several rows."""
    marks: bool = False
    """Whether published results have marks (`odelm.models.kernels.marked`), so that programs need not meet within a
    token."""
    halved: bool = False
    """Whether shared memory is divided into places of half the width: two for a piece of `qkv` or `up`, and one for a
    piece of `out` or `down`, whose slices are half as long as the state (`odelm.models.kernels.portions`). Then each
    piece has a place of its own. Only where all steps have one block, and the readout is rounded."""
    pairs: bool = False
    """Whether, with several rows and marks, results that their readers only round to bfloat16 are published by twos
    (`odelm.models.kernels.paired`)."""
    short_sums: bool = False
    """Whether, with marks, what the slices of `out` and `down` add to the state is published by twos, with 24 bits each
    (`odelm.models.kernels.sums`); only if the width is a multiple of 256, and the matrices are in bfloat16."""
    ring: int = 3
    """Pieces of the readout that are in flight or in use; the first places hold a piece of `in_ring` until then."""
    ring_slice: int = RING_SLICES[16][-1]
    readout_bits: int = 16
    """8: the readout multiplies rows rounded to int8, and computes the candidates for the best again from the rows of
    `dtype` (`odelm.models.kernels.rounded`). Unsupported where tokens are `filtered`, or there are several rows."""
    block_bits: int = 16
    """8: the matrices of the blocks are int8, with a scale for each output (`odelm.models.kernels.in_bytes`), and so is
    the readout. Unsupported where tokens are `filtered`, or there are several rows."""
    by_warps: bool = False
    """Whether each warp multiplies its own rows of a block's matrices (`odelm.models.kernels.by_warps`); only if they
    are in bfloat16, and where the readout is rounded, since a readout of 16 bits needs another right side, for which
    there would be no room."""
    attends_by_warps: bool = False
    """Whether each warp attends to its own places (`odelm.models.kernels.attend_by_warps`); only with chunks of 64
    places, heads of 64 numbers and bfloat16, and only where one launch computes all phases."""

    @property
    def several(self) -> bool:
        return self.rows > 1

    @property
    def columns(self) -> int:
        """Columns of a product, a multiple of `COLUMNS`."""
        return -(-self.rows // COLUMNS) * COLUMNS

    @property
    def rounded(self) -> bool:
        """Whether the readout's rows are rounded to int8."""
        return self.readout_bits == 8

    @property
    def in_bytes(self) -> bool:
        """Whether the matrices of the blocks are int8."""
        return self.block_bits == 8

    @property
    def block_dtype(self) -> Any:
        """The dtype of the blocks' matrices, and of what they are multiplied by."""
        return jnp.int8 if self.in_bytes else self.dtype

    @property
    def out_parts(self) -> int:
        """In how many parts a piece of `out` is kept: one for each place of the readout's ring, if that has the same
        dtype."""
        return 1 if self.rounded else self.out_slice // self.ring_slice

    @property
    def out_places(self) -> int:
        """How many places of the readout's ring have the memory of a piece of `in_ring`."""
        bits = 8 * jnp.dtype(self.block_dtype).itemsize if self.rounded else self.readout_bits
        return -(-self.out_slice * bits // (self.ring_slice * self.readout_bits))

    @property
    def matrix_places(self) -> int:
        """In how many places, beside each other, a piece of the other maps is kept."""
        return 2 if self.halved else 1

    @property
    def turns(self) -> tuple[str, ...]:
        """The maps whose pieces may take turns in a program's place."""
        return TURNS[:2] if self.halved else TURNS

    @property
    def in_ring(self) -> tuple[str, ...]:
        """The maps of which a program has one piece in the memory of the readout's ring, for each token again."""
        return ("out", "down") if self.halved else ("out",)

    @property
    def mapped_heads(self) -> int:
        """Heads of queries, keys and values."""
        return self.heads + 2 * self.kv_heads

    @property
    def up(self) -> int:
        """Outputs of the first feed-forward matrix."""
        return self.hidden * self.factors

    @property
    def factors(self) -> int:
        """How many outputs of the first feed-forward matrix a hidden unit is made of."""
        return 2 if self.activation == "swiglu" else 1

    @property
    def filled_hidden(self) -> int:
        """How many hidden units there are once zeros fill the last slice up."""
        return -(-self.hidden // self.width) * self.width

    def inputs(self, name: str) -> int:
        """Returns how many inputs a map has; hidden units are filled up to whole slices."""
        return {"out": self.heads * self.head_size, "down": self.filled_hidden}.get(name, self.width)

    def slice_of(self, name: str) -> int:
        """Returns how many inputs of a map are summed over at a time."""
        return self.out_slice if name == "out" or (self.halved and name == "down") else self.width

    def splits(self, name: str) -> int:
        """Returns into how many slices the inputs of a map are cut."""
        return self.inputs(name) // self.slice_of(name)

    def pieces(self, name: str) -> int:
        """Returns how many pieces of `ROWS` by a slice a map has."""
        rows = {"qkv": self.mapped_heads * self.head_size, "out": self.width, "up": self.up, "down": self.width}
        return rows[name] // ROWS * self.splits(name)

    @property
    def early(self) -> int:
        """How many pieces of the readout may be copied while the steps are computed, perhaps none."""
        return max(self.ring - self.out_places, 0)

    @property
    def attended(self) -> int:
        """Into how many parts attention is divided."""
        return self.rows * self.heads * self.chunk_splits

    @property
    def marked(self) -> bool:
        """Whether published results have marks: `marks`, with several programs."""
        return self.marks and self.programs > 1

    @property
    def paired(self) -> tuple[str, ...]:
        """The names of the results that are published by twos where they have marks: see `pairs` and `short_sums`."""
        if self.dtype != jnp.bfloat16 or self.width % (2 * THREADS):
            return ()
        rounded = self.pairs and self.several
        whole = rounded and self.chunk_splits == 1 and self.out_slice % (2 * THREADS) == 0
        names = {"normed": rounded, "up": rounded and self.factors == 1, "context": whole}
        names |= {"out": self.short_sums, "down": self.short_sums}
        return tuple(name for name, holds in names.items() if holds)

    @property
    def tiles(self) -> int:
        """How many tiles of the readout a program has at most."""
        return -(-self.vocabulary // (ROWS * self.programs))

    @property
    def rounded_names(self) -> tuple[str, ...]:
        """The names of the numbers that a program keeps of its words where the readout is rounded."""
        return ("logits", "most", "noise") if self.sampled else ("logits", "most")

    @property
    def kept_words(self) -> int:
        """For how many words a program has room, a multiple of `THREADS`."""
        return -(-self.tiles * ROWS // THREADS) * THREADS

    @property
    def longest(self) -> int:
        """The most inputs that a program multiplies at a time."""
        return max(self.width, self.out_slice)

    @property
    def shared_bytes(self) -> int:
        """The shared memory that a program uses, in bytes, except for reductions and barriers."""
        numbers = 2 * self.chunk_places * self.chunk * self.head_size
        ring = ROWS * self.ring * self.ring_slice
        of_blocks = ROWS * self.width + (self.longest if self.by_warps else self.columns * self.longest)
        of_int8 = 0
        if not self.rounded:
            numbers += ring
        elif self.in_bytes:
            of_int8 = ring
        else:  # the readout's right side has the memory of keys
            keys = numbers // 2 * jnp.dtype(self.dtype).itemsize
            of_int8 = ring + max(COLUMNS * self.width - keys, 0)
        logits = 2 * ROWS * self.tiles if self.filtered else 0
        if self.rounded:
            logits += len(self.rounded_names) * self.kept_words
        singles = 2 * ROWS * COLUMNS if self.several else self.longest + 2 * ROWS
        singles += self.chunk_places * self.chunk + logits
        numbers *= jnp.dtype(self.dtype).itemsize
        return numbers + of_blocks * jnp.dtype(self.block_dtype).itemsize + of_int8 + 4 * singles

    @property
    def reduction_bytes(self) -> int:
        """The shared memory through which threads add up what they have: the more of it, the less often they wait for
        each other."""
        least, free = REDUCTION_BYTES[-1], SHARED_BYTES - SPARE_BYTES - self.shared_bytes
        return next((size for size in REDUCTION_BYTES if size - least <= free), least)

    @property
    def fits(self) -> bool:
        """Whether a Hopper card has that much shared memory, and the ring has room for `out` and, with 16 bits, for one
        more place."""
        places = self.out_places + (not self.rounded)
        return self.ring >= places and self.shared_bytes + SPARE_BYTES <= SHARED_BYTES

    @property
    def slots(self) -> int:
        """Numbers kept for each program, a multiple of the threads of a warpgroup."""
        return -(-self.programs // 128) * 128

"""How many programs share the positions of a head in attention."""

MOST_SPLITS = 11
"""The most programs that share a head's positions."""
ATTENDED, CHUNK_CYCLES, SPLIT_CYCLES, WHOLE_CYCLES = 1_600, 800, 180, 45
"""Estimated cycles of a part of attention without its chunks, of a chunk, and of reading a part of a row, with the
weights of its heads, and of reading a row that is not divided, which has no weights."""


def splits(heads: int, rows: int, programs: int, chunks: int) -> int:
    """Returns among how many programs to share the positions of each head of each row: for one row all that there are,
    otherwise the number with the fewest estimated cycles: programs may take several turns, or stay idle."""
    if rows == 1:
        return max(1, min(MOST_SPLITS, programs // heads))

    def cycles(splits: int) -> int:
        turns = -(-heads * rows * splits // programs)
        row = splits * SPLIT_CYCLES if splits > 1 else WHOLE_CYCLES
        return turns * (ATTENDED + -(-chunks // splits) * CHUNK_CYCLES) + rows * row

    return min(range(1, MOST_SPLITS + 1), key=cycles)

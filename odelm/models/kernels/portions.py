"""Which pieces of a block's matrices each program has.

If there are enough programs, none has pieces of two maps that share a place, so that all stay where they are. Where
there are not (at width 1,024, 176 pieces of `qkv`, `up` and `down`), pieces take turns in a program's place, or the
layout is `halved`: slices of `out` and `down` are then half as long, and a program keeps one in the memory of the
readout's ring, which is copied again for every token; programs without a piece of `qkv` or `up` keep two more where
others have that.
"""

from typing import NamedTuple

from odelm.models.kernels.layout import ROWS, THREADS, TURNS, Layout


class Portion(NamedTuple):
    """Some of a map's pieces: the n-th of them belongs to the program base + (first + n) % span."""

    start: int
    """The first of the pieces."""
    pieces: int
    base: int
    first: int
    span: int
    kept: bool = False
    """Whether they are pieces of `down` in programs without a piece of `qkv` or `up`, of whose places each has one."""

    def owner(self, n: int) -> int:
        """Returns the program that has the n-th piece."""
        return self.base + (self.first + n) % self.span

    @property
    def rounds(self) -> int:
        """How many of the pieces a program has at most."""
        return -(-self.pieces // self.span)


def portions(layout: Layout, name: str) -> tuple[Portion, ...]:
    """Returns the portions of a map's pieces."""
    programs, count, before, up = layout.programs, *(layout.pieces(of) for of in (name, *TURNS[:2]))
    match name:
        case "up":
            return (Portion(0, count, 0, before % programs, programs),)
        case "down" if layout.halved:
            others = programs - layout.pieces("out")
            in_ring, rest = min(count, others), max(count - others, 0)
            last = min(rest, programs - before - up)
            found = (
                Portion(0, in_ring, programs - others, 0, others),
                Portion(in_ring, rest, programs - last, 0, last, True),
            )
            return found if rest else found[:1]
        case "down" if before < programs and -(-count // (programs - before)) == -(-count // programs):
            return (Portion(0, count, before, up % (programs - before), programs - before),)
        case "down":
            return (Portion(0, count, 0, (before + up) % programs, programs),)
    return (Portion(0, count, 0, 0, programs),)


def participants(layout: Layout, *names: str) -> int:
    """Returns how many programs have a piece of any of these maps; with no names, how many have a part in attention;
    with the name "rows", how many have a row of the batch."""
    if not names:
        return min(layout.attended, layout.programs)
    if names == ("rows",):
        return min(layout.rows, layout.programs)
    found = [portion for name in names for portion in portions(layout, name)]
    return len({portion.owner(n) for portion in found for n in range(portion.pieces)})


def can_be_halved(layout: Layout) -> bool:
    """Whether pieces take turns in this layout, which is not halved, and would not in a halved one."""
    before, up, down = (layout.pieces(name) for name in TURNS)
    half, free = layout.width // 2, layout.programs - before - up
    inputs = [layout.inputs(name) for name in ("out", "down")]
    out, halves = (layout.width // ROWS * (of // half) for of in inputs)
    whole = half % THREADS == 0 and all(of % half == 0 for of in inputs)
    return whole and 0 <= free < down and out < layout.programs and out + halves <= layout.programs + 2 * free


def kept(layout: Layout) -> int:
    """Returns how many programs, the last ones, have pieces of `down` in the places of other maps."""
    return sum(portion.span for portion in portions(layout, "down") if portion.kept)

"""The tokens that a kernel computes at a time."""

from dataclasses import dataclass
from typing import Any

import jax

Ref = Any


@dataclass(frozen=True)
class Token:
    """The token that is computed; int32 () each."""

    word: jax.Array
    position: jax.Array
    place: jax.Array
    """Where its key and value go in the memory."""
    number: jax.Array
    """How many tokens this launch computed before."""

    def of(self, row: Any) -> "Token":
        """Returns the token of a row."""
        del row
        return self


@dataclass(frozen=True)
class Tokens:
    """The tokens of several rows that are computed together."""

    texts: Ref
    """int32 (`TEXTS`, columns of a product)."""
    number: jax.Array
    """As in `Token`."""

    def of(self, row: Any) -> Token:
        """Returns the token of a row."""
        word, position, place = (self.texts[TEXTS.index(name), row] for name in TEXTS[:3])
        return Token(word, position + self.number, place + self.number, self.number)


Newest = Token | Tokens
TEXTS = ("word", "position", "place", "done")
"""The numbers kept of each of several rows: its newest token, its first one's position and place in this launch, and
whether it has ended."""

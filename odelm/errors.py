"""The one error that bad input raises: what was got, what was expected, what to try."""

import difflib
import re
from collections.abc import Iterable

EVERYWHERE = "Every process of the run fails."
"""The note of an exception that every process knows of, so that they can end together."""


class InputError(ValueError):
    """A mistake in what the user gave: a config field, a path, a flag, a grid.

    Its message is one line meant for a person; the command-line programs print it without a traceback
    and exit with status 2.
    """


class SystemFailure(InputError):
    """The system failed, at a file or a process: nothing may be wrong with what was given, and it may work again."""


class RunFailure(RuntimeError):
    """A run that cannot continue, although nothing is wrong with what was asked for: it has diverged, the disk is full.

    Its message is one line, which says what is kept; the programs print it and exit with status 1.
    """


class Diverged(RunFailure):
    """A run whose loss, gradients or parameters are no longer finite numbers."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an allocation of NumPy's or JAX's failed, of a device's memory or of the machine's.

    JAX has no type for it, and uses the same name for data that does not fit on a chip, a defect of a kernel.
    """
    if isinstance(error, MemoryError):
        return True
    told = str(error)
    wanted = re.search("out of memory|failed to allocate", told, re.IGNORECASE)
    on_chip = re.search("shared memory|vmem|smem", told, re.IGNORECASE)
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in told and bool(wanted) and not on_chip


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns a hint naming the choice closest to a mistyped `name`, followed by all the choices."""
    choices = sorted(choices)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}choices: {', '.join(choices)}"

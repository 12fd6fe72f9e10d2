"""What the processes of a run do together: all fail if one of them fails."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from odelm.errors import EVERYWHERE, RunFailure


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Fails in every process if the block fails in one: where it does not, RunFailure says which process to ask.

    `what` is what the block does, in words. The block may not wait for other processes. The errors have the note
    `EVERYWHERE`.
    """
    try:
        yield
    except BaseException as error:
        error.add_note(EVERYWHERE)
        with contextlib.suppress(Exception):  # Where another process has died, this error is still the one to report.
            failures(failed=True)
        raise
    if others := failures(failed=False):
        failure = RunFailure(f"process {others[0]} failed while {what}: see what it says")
        failure.add_note(EVERYWHERE)
        raise failure


def failures(*, failed: bool) -> list[int]:
    """Returns the numbers of the processes that failed; all of them call it, and wait for each other."""
    if jax.process_count() == 1:
        return [0] if failed else []
    return np.flatnonzero(np.asarray(multihost_utils.process_allgather(np.array(failed)))).tolist()

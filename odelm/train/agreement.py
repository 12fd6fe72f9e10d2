"""What the processes of a run decide together: that it stops, after the same update in each."""

from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from odelm import sharding
from odelm.train.prefetch import MAX_IN_FLIGHT


class Agreement:
    """The largest of a number that each process has, such as the signal that it got.

    One process hears its own at once. Several tell it at every call of `tell`, and hear the largest some calls later,
    so that nobody waits for it, but all at the same call.
    """

    def __init__(self, mesh: Mesh, own: Callable[[], int]):
        self._mesh, self._own = mesh, own
        self._alone = jax.process_count() == 1
        self._told, self._heard = deque[jax.Array](), 0
        self._largest = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))

    @property
    def number(self) -> int:
        """The largest number that was heard of, 0 before any."""
        return self._own() if self._alone else self._heard

    def tell(self) -> None:
        """Tells the others this process's number; to be called by all of them after the same update."""
        if self._alone:
            return
        own = np.full(len(self._mesh.local_devices), self._own(), np.int32)
        parts = jax.make_array_from_process_local_data(sharding.every_device(self._mesh), own)
        self._told.append(self._largest(parts))
        if len(self._told) > MAX_IN_FLIGHT:
            self._hear()

    def close(self) -> int:
        """Returns the largest number that was told."""
        while self._told:
            self._hear()
        return self.number

    def _hear(self) -> None:
        self._heard = max(self._heard, int(self._told.popleft()))

"""What the processes of a run decide together: to stop, all after the same update."""

from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from odelm import sharding
from odelm.train.prefetch import MAX_IN_FLIGHT


class Agreement:
    """The maximum over all processes of a number that each one has, such as the signal that it received.

    A single process sees its own number at once. Several processes send theirs at every call of `tell`, and receive the
    maximum some calls later, so that none waits for it, but all at the same call.
    """

    def __init__(self, mesh: Mesh, own: Callable[[], int]):
        self._mesh, self._own = mesh, own
        self._alone = jax.process_count() == 1
        self._told, self._heard = deque[jax.Array](), 0
        self._largest = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))

    @property
    def number(self) -> int:
        """The largest number received so far, 0 before any."""
        return self._own() if self._alone else self._heard

    def tell(self) -> None:
        """Sends this process's number to the others; all processes must call it after the same update."""
        if self._alone:
            return
        own = np.full(len(self._mesh.local_devices), self._own(), np.int32)
        parts = jax.make_array_from_process_local_data(sharding.every_device(self._mesh), own)
        self._told.append(self._largest(parts))
        if len(self._told) > MAX_IN_FLIGHT:
            self._hear()

    def close(self) -> int:
        """Returns the largest number that was sent, once all have been received."""
        while self._told:
            self._hear()
        return self.number

    def _hear(self) -> None:
        self._heard = max(self._heard, int(self._told.popleft()))

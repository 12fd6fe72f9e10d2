"""The next batch, placed on the devices, and the time spent waiting for it."""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from odelm import sharding
from odelm.models.loss import Batch

MAX_IN_FLIGHT = 2
"""The most updates that may be dispatched and unfinished while the next batch is fetched."""


class Prefetch:
    """Batches on the devices of a mesh.

    `waited` is the time spent waiting for data: about 0 when the loader keeps up, and otherwise an upper bound on the
    time that the device is idle.
    """

    def __init__(self, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh):
        """`batches` are this process's rows of each batch."""
        self._batches, self._mesh = batches, mesh
        self._waited = 0.0
        self._in_flight: deque[Any] = deque(maxlen=MAX_IN_FLIGHT)

    def next_after(self, metrics: Any) -> Batch:
        """Returns the next batch once at most `MAX_IN_FLIGHT` updates are unfinished; `metrics` are those of the last
        update.

        A loop that runs ahead of the device would wait for batches that the device does not need yet.
        """
        if len(self._in_flight) == MAX_IN_FLIGHT:
            jax.block_until_ready(self._in_flight[0])
        self._in_flight.append(metrics)
        return self.next()

    def next(self) -> Batch:
        """Returns the next batch."""
        since = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - since
        return sharding.place_batch(batch, self._mesh)

    def waited(self) -> float:
        """Returns the seconds spent waiting for data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

"""The share of time waited for data is near none where data keep up, however far the host could run ahead."""

import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from odelm.train import prefetch

UPDATE, COUNT = 0.03, 40


class Device:
    """Does an update after the other, `UPDATE` seconds each, while the host continues."""

    def __init__(self):
        self.free = 0.0

    def update(self) -> "Result":
        self.free = max(self.free, time.perf_counter()) + UPDATE
        return Result(self.free)


class Result:
    """What an update gives, once it is done."""

    def __init__(self, done: float):
        self.done = done

    def block_until_ready(self) -> "Result":
        time.sleep(max(0.0, self.done - time.perf_counter()))
        return self


def ready(seconds: float) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of which eight may be made ahead, in a thread."""
    made: queue.Queue = queue.Queue(maxsize=8)

    def make():
        for _ in range(COUNT + 8):
            time.sleep(seconds)
            made.put({"tokens": np.zeros((1, 4), np.int32)})

    threading.Thread(target=make, daemon=True).start()
    time.sleep(10 * seconds)
    while True:
        yield made.get()


@pytest.mark.parametrize(("seconds", "low", "high"), [(0.01, 0.0, 0.1), (0.09, 0.6, 1.0)])
def test_the_share_waited(seconds: float, low: float, high: float, monkeypatch):
    """Eight batches lie ready, as Grain keeps them, and another takes `seconds` to make, while an update takes 0.03. A
    host that is not held back empties them before the first update is done, and waits for the rest though the device
    has enough to do. With data three times as slow as the device it stands still for two thirds of the time, of which
    this is an upper bound. The bounds leave room for a busy machine."""
    monkeypatch.setattr(prefetch.sharding, "place_batch", lambda batch, mesh: batch)
    monkeypatch.setattr(prefetch.jax, "block_until_ready", lambda result: result.block_until_ready())
    batches, device = prefetch.Prefetch(ready(seconds), None), Device()
    batches.next()
    batches.waited()
    since = time.perf_counter()
    for _ in range(COUNT):
        batches.next_after(device.update())
    assert low <= batches.waited() / (time.perf_counter() - since) <= high

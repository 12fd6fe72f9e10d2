"""The updates since the last record of the log, and what is recorded of them."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

Record = dict[str, Any]


class Window:
    """Metrics of updates, some of which may still be running on the devices, and the time that they took."""

    def __init__(self, before: Sequence[dict[str, float]] = (), read: int = 0):
        """`before` is what `unrecorded` returned when the run was saved, and `read` the value that it had then."""
        self.read = read
        """How many tokens the run had read by the last record, without padding."""
        self._metrics: list[dict[str, Any]] = list(before)
        self._own = 0
        self.closed = 0
        """How many updates of this process the last record covers."""
        self.closed_tokens = 0
        """How many tokens those updates had, without padding."""
        self._since = time.perf_counter()

    def add(self, metrics: dict[str, Any], steps: int) -> None:
        """Adds an update that took so many depth steps."""
        self._metrics.append(metrics | {"steps": steps})
        self._own += 1

    def leave_out(self, seconds: float) -> None:
        """Subtracts time that was not spent on updates."""
        self._since += seconds

    def unrecorded(self) -> list[dict[str, float]]:
        """Returns the metrics that the next record will cover, as numbers: waits for the updates."""
        self._metrics = [
            {name: float(np.asarray(value)) for name, value in metrics.items()}
            for metrics in jax.device_get(self._metrics)
        ]
        return list(self._metrics)

    def close(self, *, waited: float) -> Record:
        """Returns the log's record of the updates, and starts a new one.

        `loss` is the mean over the updates that were not skipped, `loss_by_steps` the same for each number of steps,
        `mean_steps` the mean number of steps over all updates, `tokens` the tokens that the run has read by then,
        without padding, and `tokens_per_s` the rate in this process since its last record. The norms are those of the
        last update, and `data_wait` is the share of the time that was spent waiting for data. A number that is not
        finite is None.
        """
        updates = self.unrecorded()
        tokens = [int(update["tokens"]) for update in updates]
        self.closed_tokens, self.read = sum(tokens[len(tokens) - self._own :]), self.read + sum(tokens)
        used = [update for update in updates if not update.get("skipped")]
        seconds = time.perf_counter() - self._since
        counts = sorted({int(update["steps"]) for update in used})
        record = {
            "loss": _mean(update["loss"] for update in used),
            "loss_by_steps": {str(n): _mean(u["loss"] for u in used if u["steps"] == n) for n in counts},
            **{name: _finite(updates[-1][name]) for name in updates[-1] if name.endswith("_norm")},
            "tokens_per_s": self.closed_tokens / seconds,
            "mean_steps": _mean(update["steps"] for update in updates),
            "data_wait": waited / seconds,
            "tokens": self.read,
        }
        if len(used) < len(updates):
            record["skipped"] = len(updates) - len(used)
        self._metrics, self.closed, self._own, self._since = [], self._own, 0, time.perf_counter()
        return record


def _mean(values: Any) -> float | None:
    found = list(values)
    return _finite(math.fsum(found) / len(found)) if found else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

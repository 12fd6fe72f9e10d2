"""A trace of some updates of a run, by `jax.profiler`, for TensorBoard, XProf or Perfetto."""

from pathlib import Path
from typing import Any

import jax

PROFILE = "profile"
SKIPPED = 3
"""Updates before the first that is traced: they are slower."""


class Profile:
    """Traces `updates` updates of a run, from the fourth on, into its directory; none with 0."""

    def __init__(self, workdir: Path, updates: int):
        self._directory, self._updates, self._seen = workdir / PROFILE, updates, 0

    def after_update(self, metrics: Any) -> str | None:
        """Is called after each update; returns what to print once the trace is written."""
        self._seen += 1
        if not self._updates or self._seen > SKIPPED + self._updates:
            return None
        if self._seen == SKIPPED:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(str(self._directory))
        elif self._seen == SKIPPED + self._updates:
            jax.block_until_ready(metrics)
            return self.close()
        return None

    def close(self) -> str | None:
        """Ends a trace that is under way, as when the run ends first."""
        if not self._updates or not SKIPPED <= self._seen <= SKIPPED + self._updates:
            return None
        traced, self._updates = self._seen - SKIPPED, 0
        jax.profiler.stop_trace()
        return f"a trace of {traced} updates is in {self._directory}"

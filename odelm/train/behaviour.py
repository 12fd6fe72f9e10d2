"""A summary of a run, printed at its end."""

from odelm.train.window import Record


class Behaviour:
    """The totals of this process's records."""

    def __init__(self) -> None:
        self._updates, self._tokens, self._seconds, self._waited, self._skipped, self._jumps = 0, 0, 0.0, 0.0, 0, 0
        self._first: float | None = None
        self._last: float | None = None

    def add(self, record: Record, *, updates: int, tokens: int, jumped: bool) -> None:
        """Adds a record of `updates` updates and `tokens` tokens, padding excluded."""
        seconds = tokens / record["tokens_per_s"]
        self._updates, self._tokens = self._updates + updates, self._tokens + tokens
        self._seconds, self._waited = self._seconds + seconds, self._waited + record["data_wait"] * seconds
        self._skipped += record.get("skipped", 0)
        self._jumps += jumped
        if record["loss"] is not None:
            self._first = record["loss"] if self._first is None else self._first
            self._last = record["loss"]

    def summary(self) -> str | None:
        """Returns one sentence, None if there was no record."""
        if not self._updates:
            return None
        loss = "" if self._first is None else f", loss {self._first:.3f} at first and {self._last:.3f} at last"
        return (
            f"{self._updates} updates in {self._seconds:,.0f} s: {self._tokens / self._seconds:,.0f} tokens/s, "
            f"{self._waited / self._seconds:.1%} of the time waiting for data{loss}; "
            f"{self._skipped} updates skipped, {self._jumps} jumps of the loss"
        )

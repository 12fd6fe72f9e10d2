"""Timing with a clock of our own."""

import numpy as np
import pytest

from odelm.infer import latency


def test_calls_take_turns_and_the_warm_up_does_not_count(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: list[float]):
        def run() -> None:
            order.append(name)
            now[0] += seconds.pop(0)

        return run

    warmup = [50.0, 50.0]
    calls = {"a": call("a", [*warmup, 1.0, 2.0, 9.0]), "b": call("b", [*warmup, 4.0, 4.0, 4.0])}
    measured = latency.measure(calls, repeats=3, warmup=2)
    assert order == ["a", "a", "b", "b", *"ababab"]
    assert measured["a"].median == pytest.approx(2000)
    assert measured["a"].p90 == pytest.approx(1e3 * np.quantile([1, 2, 9], 0.9))
    assert measured["b"] == latency.Latency(4000.0, 4000.0)
    assert all(one.median <= one.p90 for one in measured.values())

"""Programs are compiled side by side only where that is safe."""

import threading

import jax
import pytest

from odelm.compiling import side_by_side


def overlaps(monkeypatch, backend: str, devices: int, **options) -> bool:
    """Returns whether two calls are under way at once, on two cores."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    meet = threading.Barrier(2)

    def call(item: int) -> bool:
        try:
            meet.wait(timeout=2.0 if item else 0.5)
        except threading.BrokenBarrierError:
            return False
        return True

    first, second = side_by_side(call, [0, 1], **options)
    assert first == second
    return first


@pytest.mark.parametrize(
    "backend, devices, runs, expected",
    [
        ("cpu", 1, True, True),
        ("cpu", 8, True, False),
        ("cpu", 8, False, True),
        ("tpu", 4, False, False),
        ("gpu", 1, False, False),
    ],
)
def test_calls_overlap_only_where_that_is_safe(backend, devices, runs, expected, monkeypatch):
    assert overlaps(monkeypatch, backend, devices, runs=runs) == expected

"""What a program prints beside its own words."""

import sys
from types import SimpleNamespace

import pytest

from odelm import cli


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """Returns what an exception that nobody catches is told by, as it comes."""
    messages = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: messages.append(str(unraisable.exc_value)))
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    assert cli.run(lambda: None, ["program"], "") == 0
    return messages


def test_reads_that_outlive_their_event_loop_are_not_told(told):
    for message in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_type=RuntimeError, exc_value=RuntimeError(message)))
    assert told == ["another"]

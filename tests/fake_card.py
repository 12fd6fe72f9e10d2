"""A GPU that does not exist: generators choose what decodes as if it did."""

import types
from typing import Any

import jax
import pytest

from odelm.infer import generator, kernel_choice
from odelm.models.kernels.layout import PROGRAMS


def card(monkeypatch: pytest.MonkeyPatch, **of: Any) -> types.SimpleNamespace:
    """Returns a card, with a jax that has kernels for it."""
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    return types.SimpleNamespace(**dict(platform="gpu", compute_capability="9.0", core_count=PROGRAMS) | of)


def choose_on(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets generators choose what decodes on a device."""
    choose = kernel_choice.choose

    def choose_there(asked: str, reason: str | None, _: Any, **options: bool) -> kernel_choice.Choice:
        return choose(asked, reason, device, **options)

    monkeypatch.setattr(kernel_choice, "choose", choose_there)


def decode_on(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets generators choose what decodes on a device; XLA's program decodes in place of a kernel."""

    def decode(_: Any, runner: Any, *state: Any, end: int) -> Any:
        return generator._advance(runner.graph, runner.params, *state, end=end, early_exit=None)

    choose_on(device, monkeypatch)
    monkeypatch.setattr(kernel_choice.ByKernel, "advance", decode)

"""Skips the tests on a card, with the reason, where there is none that the kernels are for."""

import functools

import jax
import pytest


@functools.cache
def missing() -> str | None:
    """Returns what the kernels lack here; None if they can run."""
    try:
        platform = jax.default_backend()
    except (AssertionError, RuntimeError) as error:  # JAX_PLATFORMS names one that JAX cannot start
        return f"there is no GPU that JAX can use: {str(error) or 'none was found'}"
    if platform != "gpu":
        return "there is no GPU here (JAX_PLATFORMS=cuda)"
    if jax.__version_info__ < (0, 11):
        return "the kernels need jax 0.11 or later"
    card = jax.devices()[0]
    if not str(getattr(card, "compute_capability", "")).startswith("9"):
        return "the kernels are for Hopper cards"
    if getattr(card, "core_count", 0) < 132:
        return "a kernel that stays would wait for programs that never start"
    return None


@pytest.fixture(scope="session", autouse=True)
def card() -> None:
    """Decides for all tests of this folder."""
    if reason := missing():
        pytest.skip(reason)

"""Skips the tests of kernels, with the reason, where no GPU can run them."""

import os
from pathlib import Path

import jax
import pytest

CARD = Path("/dev/nvidia0")


def missing() -> str | None:
    """Returns what the kernels lack here, None if they can run; raises JAX's error if it cannot use a card that is
    there."""
    try:
        platform = jax.default_backend()
    except (AssertionError, RuntimeError) as error:  # JAX_PLATFORMS names one that JAX cannot start
        if CARD.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise
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

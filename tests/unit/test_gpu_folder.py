"""When tests on a card are skipped, and when a card that cannot be used is an error."""

import types

import jax
import pytest

from tests.gpu import conftest


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A machine that has a card, which JAX cannot start."""

    def fail():
        raise RuntimeError("the driver is too old")

    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(conftest, "CARD", tmp_path / "nvidia0")
    monkeypatch.setattr(jax, "default_backend", fail)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "nvidia0"


def test_a_card_that_jax_cannot_use_is_an_error(broken):
    with pytest.raises(RuntimeError, match="driver is too old"):
        conftest.missing()


def test_a_machine_without_a_card_or_with_a_hidden_one_skips(broken, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert conftest.missing() == "there is no GPU that JAX can use: the driver is too old"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    broken.unlink()
    assert conftest.missing() == "there is no GPU that JAX can use: the driver is too old"


@pytest.mark.parametrize(
    ("version", "capability", "count", "reason"),
    [
        ((0, 11, 2), "9.0", 132, None),
        ((0, 10, 2), "9.0", 132, "the kernels need jax 0.11 or later"),
        ((0, 11, 2), "8.0", 108, "the kernels are for Hopper cards"),
        ((0, 11, 2), "9.0", 114, "a kernel that stays would wait for programs that never start"),
    ],
)
def test_a_card_that_kernels_are_not_for_skips(monkeypatch, version, capability, count, reason):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "__version_info__", version)
    card = types.SimpleNamespace(compute_capability=capability, core_count=count)
    monkeypatch.setattr(jax, "devices", lambda: [card])
    assert conftest.missing() == reason

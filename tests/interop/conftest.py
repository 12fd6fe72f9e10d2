"""Models of `transformers` with weights at which every part matters, and what they compute.

Where torch or transformers is not installed these tests are skipped; `make test-interop` installs them and sets
ODELM_INTEROP, with which a missing one is an error.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def needed(name: str):
    """Returns a library; skips the module that asks for it where it is not installed."""
    if os.environ.get("ODELM_INTEROP"):
        return __import__(name)
    return pytest.importorskip(name, reason=f"{name} is not installed; make test-interop installs it")


def redrawn(model, *, seed: int = 0, scale: float = 0.15):
    """Returns a torch model in evaluation with every parameter drawn anew, norms around one."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.copy_(middle + scale * torch.randn(parameter.shape, generator=generator))
    model.tie_weights()
    return model.eval()


class Inputs(dict):
    """Tokens, a padding mask and token types, as arrays, and as what either side takes."""

    @classmethod
    def drawn(cls, length: int, *, vocab_size: int, padded: int, types: bool, seed: int = 0) -> "Inputs":
        rng = np.random.default_rng(seed)
        # Token 0 is the padding of BERT and ALBERT, whose embedding torch keeps from learning.
        tokens = rng.integers(1, vocab_size, (3, length)).astype(np.int32)
        mask = np.ones((3, length), bool)
        if padded:
            mask[1, -padded:] = False
        made = cls(tokens=tokens, mask=mask)
        if types:
            made["token_types"] = np.tile((np.arange(length) > length // 2).astype(np.int32), (3, 1))
        return made

    def torch(self) -> dict:
        import torch

        names = {"tokens": "input_ids", "mask": "attention_mask", "token_types": "token_type_ids"}
        return {names[name]: torch.tensor(array).long() for name, array in self.items()}

    def options(self) -> dict:
        return {name: array for name, array in self.items() if name != "tokens"}


def difference(got, want, mask: np.ndarray | None = None) -> float:
    """Returns the largest difference over the largest value, at real tokens."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    if mask is not None and got.ndim == 3:
        got, want = got[mask], want[mask]
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """Returns a function that saves a torch model and returns its folder."""

    def save(model, **options) -> Path:
        folder = tmp_path / f"folder{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder, **options)
        return folder

    return save

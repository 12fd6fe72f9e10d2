"""Folders written by ourselves; that `transformers` reads and writes the same is tested in tests/interop."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from odelm import interop

PLAIN = dict(norm="layernorm", positions="learned", qk_norm=False, bias=True, time_modulation=False)
ALBERT = PLAIN | dict(kind="encoder", norm_placement="post", embed_norm=True, embed_dim=8, token_types=2)
GPT2 = PLAIN | dict(groups=4)


@pytest.fixture
def albert(make_model, tmp_path) -> Path:
    """Returns a folder of a tiny ALBERT."""
    interop.export(make_model(**ALBERT), tmp_path / "albert")
    return tmp_path / "albert"


@pytest.fixture
def gpt2(make_model, tmp_path) -> Path:
    interop.export(make_model(**GPT2), tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def change() -> Callable[..., None]:
    """Returns a function that edits a folder's config.json, and its tensors by a function of the dict of them."""

    def edit(folder: Path, *, tensors: Callable[[dict[str, np.ndarray]], None] | None = None, **config) -> None:
        from safetensors.numpy import load_file, save_file

        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if tensors is not None:
            held = load_file(folder / "model.safetensors")
            tensors(held)
            save_file({name: np.ascontiguousarray(t) for name, t in held.items()}, folder / "model.safetensors")

    return edit

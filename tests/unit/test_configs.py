"""Every recipe under configs/ is one."""

from pathlib import Path

import pytest

from odelm import cli
from odelm.config import replace

RECIPES = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_gives_a_config_that_can_be(path):
    config = cli.read_recipe(str(path))
    if config.data.corpus == "text":
        config = replace(config, {"data.source": "texts"})
    assert config.validate() is config
    assert f"--config=configs/{path.name}" in path.read_text(), "the docstring has the command"


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert {
        "tiny",
        "tiny_encoder",
        "decoder_small",
        "decoder_medium",
        "encoder_base",
        "encoder_large",
        "adapt",
    } <= names

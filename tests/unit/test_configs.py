"""Every recipe under configs/ is one, by its file and by its name, and what is none is told."""

from pathlib import Path

import pytest

from odelm.config import load_recipe, recipe_names, replace
from odelm.errors import InputError

RECIPES = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_gives_a_config_that_can_be(path):
    config = load_recipe(str(path))
    if config.data.corpus == "text" or config.data.task:
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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n\ndef get_config(:\n", "line 3: SyntaxError: invalid syntax"),
        ("A recipe's text\n", "line 1: SyntaxError"),
        ("import absent_package\n", "line 1: ModuleNotFoundError: No module named 'absent_package'"),
        ("x = 1\n", "has no get_config"),
        ("def get_config():\n    return half()\n\ndef half():\n    return 1 / 0\n", "line 5: ZeroDivisionError"),
        ("def get_config(name):\n    return name\n", "TypeError: get_config.. missing 1 required"),
        ("def get_config():\n    return {}\n", "returns a dict, expected an odelm.Config"),
        ("def get_config():\n    pass\n", "returns a NoneType, expected an odelm.Config"),
        ("import odelm\nget_config = odelm.ModelConfig\n", "returns a ModelConfig, expected an odelm.Config"),
        (
            "import odelm\n\ndef get_config():\n    return odelm.Config(model=odelm.ModelConfig(widht=3))\n",
            "line 4: ModelConfig has no option 'widht'; did you mean 'width'",
        ),
        (
            "import odelm\nconfig = odelm.Config(modle=3)\n",
            "line 2: Config has no option 'modle'; did you mean 'model'",
        ),
        ("dict(a=1).b(c=2)\n", "line 1: AttributeError"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_told(tmp_path: Path, source: str, message: str):
    path = tmp_path / "recipe.py"
    path.write_text(source)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.py", "", ".", "absent", "__init__"])
def test_a_recipe_that_is_no_file_is_told(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_found_by_its_name_from_anywhere(path, tmp_path, monkeypatch):
    expected = load_recipe(path)
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path.stem) == expected
    assert path.stem in recipe_names()


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_text("import odelm\ndef get_config():\n    return odelm.Config(odelm.ModelConfig(width=24))\n")
    assert load_recipe("tiny").model.width == 24


def test_the_nearest_name_is_told():
    with pytest.raises(InputError, match="'tinny' cannot be read.*did you mean 'tiny'"):
        load_recipe("tinny")

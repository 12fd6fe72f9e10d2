"""What a program prints beside its own words, and how a recipe is read."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from odelm import cli
from odelm.errors import InputError


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
@pytest.mark.parametrize("flag", ["--config={}", "-config={}", "--config {}"])
def test_a_recipe_that_cannot_be_used_is_told(tmp_path: Path, source: str, message: str, flag: str):
    path = tmp_path / "recipe.py"
    path.write_text(source)
    with pytest.raises(InputError, match=message) as caught:
        cli.check_recipe(["train.py", *flag.format(path).split(), "--config.model.width=3"])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.py", "", "."])
def test_a_recipe_that_is_no_file_is_told(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        cli.check_recipe([f"--config={name}"])

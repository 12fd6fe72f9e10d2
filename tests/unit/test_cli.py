"""What a program prints beside its own words, and how a recipe is read."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from odelm import cli
from odelm.config import Config, ModelConfig
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
def test_a_recipe_that_cannot_be_used_is_told(tmp_path: Path, source: str, message: str):
    path = tmp_path / "recipe.py"
    path.write_text(source)
    with pytest.raises(InputError, match=message) as caught:
        cli.read_recipe(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.py", "", "."])
def test_a_recipe_that_is_no_file_is_told(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        cli.read_recipe(name)


def test_overrides_are_taken_in_every_form_and_anywhere():
    given = [
        "--config.train.updates=3", "--config=a.py", "-config.model.bias", "--config.data.source", "x y",
        "--config.mesh.data", "-1", "--workdir=w",
    ]  # fmt: skip
    assert cli.with_overrides(given) == [
        "--override=train.updates=3", "--config=a.py", "--override=model.bias=true", "--override=data.source=x y",
        "--override=mesh.data=-1",        "--workdir=w",
    ]  # fmt: skip


def test_an_override_has_the_type_of_its_option():
    overrides = [
        "train.updates=3", "optimizer.learning_rate=1e-3", "model.bias=true", "step_sampling.counts=3,6",
        "model.embed_dim=none", "data.source=a=b", "train.eval_steps=(4, 2)", "data.weights=0.5",
        "step_sampling.weights=",
    ]  # fmt: skip
    config = cli.overridden(Config(model=ModelConfig(embed_dim=8)), overrides)
    assert (config.train.updates, config.optimizer.learning_rate, config.model.bias) == (3, 1e-3, True)
    assert (config.step_sampling.counts, config.model.embed_dim, config.data.source) == ((3, 6), None, "a=b")
    assert (config.train.eval_steps, config.data.weights, config.step_sampling.weights) == ((4, 2), (0.5,), ())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=3", "config.model has no option 'widht'; did you mean 'width'"),
        ("modle.width=3", "config has no option 'modle'; did you mean 'model'"),
        ("model.width=abc", "--config.model.width: 'abc' is not of type int"),
        ("model.width=1.5", "--config.model.width: '1.5' is not of type int"),
        ("model.bias=maybe", "--config.model.bias: 'maybe' is not a bool: expected true or false"),
        ("step_sampling.counts=3,a", "--config.step_sampling.counts: 'a' is not of type int"),
        ("step_sampling.counts=(3", "--config.step_sampling.counts: '.3' is not a tuple"),
    ],
)
def test_an_override_that_is_wrong_is_named(override, message):
    with pytest.raises(InputError, match=message):
        cli.overridden(Config(), [override])


def test_compiled_programs_are_kept_unless_the_environment_says_where(monkeypatch, tmp_path):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    cli.use_compilation_cache(str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cli.use_compilation_cache("")
    assert not updates
    cli.use_compilation_cache(str(tmp_path))
    assert Path(updates["jax_compilation_cache_dir"]).parent == tmp_path

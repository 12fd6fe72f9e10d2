"""Recipes: Python files with a `get_config()`, found by path or, those of this project, by name."""

import dataclasses
import re
import traceback
import typing
from pathlib import Path
from types import ModuleType

from odelm import config as configs
from odelm.config.recipe import Config
from odelm.errors import InputError, nearest

PACKAGE = Path(__file__).parents[1]


def recipe_names() -> list[str]:
    """Returns the names of this project's recipes."""
    return sorted(path.stem for path in _folder().glob("*.py") if path.stem != "__init__")


def load_recipe(recipe: str | Path) -> Config:
    """Returns what `get_config()` of a recipe returns.

    `recipe` is a file, or the name of one of this project's, such as `tiny`. Raises InputError, naming the line, for
    what is no recipe.
    """
    path = str(recipe)
    if not Path(path).is_file() and path in recipe_names():
        path = str(_folder() / f"{path}.py")
    if not Path(path).is_file():
        raise InputError(
            f"the recipe {str(recipe)!r} cannot be read: expected a file, such as configs/tiny.py, or a name; "
            f"{nearest(str(recipe), recipe_names())}"
        )
    module = ModuleType("recipe")
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
        make = getattr(module, "get_config", None)
        config = make() if make else None
    except Exception as error:  # a recipe is a program, which may raise anything
        raise InputError(f"the recipe {path}{_line_of(error, path)}: {_told(error)}") from error
    if not make:
        raise InputError(f"the recipe {path} has no get_config(), expected one that returns an odelm.Config")
    if not isinstance(config, Config):
        raise InputError(f"get_config() of {path} returns a {type(config).__name__}, expected an odelm.Config")
    return config


def _folder() -> Path:
    """Returns where this project's recipes are: in the installed package, or beside it in a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def _line_of(error: Exception, path: str) -> str:
    """Returns where in the file at `path` an exception came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def _told(error: Exception) -> str:
    """Returns the first line of an exception; of an unknown option of a config, the nearest one that exists."""
    unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    part = getattr(configs, unknown[1], None) if unknown else None
    if unknown and dataclasses.is_dataclass(part):
        return f"{unknown[1]} has no option {unknown[2]!r}; {nearest(unknown[2], typing.get_type_hints(part))}"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}".splitlines()[0]

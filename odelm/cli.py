"""Running a program: flags parsed, mistakes told in one line with status 2."""

import dataclasses
import re
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from absl import app, flags, logging

from odelm import config as configs
from odelm.config import Config
from odelm.errors import InputError, nearest


def run(main: Callable[[], None], argv: list[str], usage: str) -> int:
    """Parses the flags of `argv`, calls `main`, and returns the exit status.

    A mistake in the input is one line on stderr and status 2, without a traceback; `--help` prints `usage` and
    the flags. Any other exception is a defect of ours and keeps its traceback.
    """
    app.define_help_flags()
    sys.modules["__main__"].__doc__ = usage
    try:
        check_recipe(argv)
        check_overrides(argv)
        # An override is only understood after the recipe that it overrides, wherever the user put it.
        argv[1:] = sorted(argv[1:], key=lambda argument: not argument.startswith("--config="))
        extra = flags.FLAGS(argv)
        if len(extra) > 1:
            raise InputError(f"{extra[1]!r} is not a flag; flags look like --name=value")
        # Orbax warns of what is normal here; a mistake should be the only line that is seen.
        logging.set_verbosity(logging.ERROR)
        _ignore_late_reads()
        main()
    except (InputError, flags.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _ignore_late_reads() -> None:
    """Keeps quiet about reads of a damaged checkpoint that end after Orbax has closed their event loop."""
    tell = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    # It stays for good: they may end when the error has been told.
    sys.unraisablehook = hook


def check_recipe(argv: Sequence[str]) -> None:
    """Raises InputError if the recipe that `--config` names cannot be used.

    The flag's own parser would tell most mistakes in a recipe with a traceback.
    """
    for position, argument in enumerate(argv):
        name, given, path = argument.partition("=")
        if name in ("--config", "-config"):
            read_recipe(path if given else "".join(argv[position + 1 : position + 2]))


def read_recipe(path: str) -> Config:
    """Returns what `get_config()` in a file returns; raises InputError, naming the line, for what is no recipe."""
    if not Path(path).is_file():
        raise InputError(f"the recipe {path!r} cannot be read: expected a file such as configs/tiny.py")
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


def check_overrides(argv: Sequence[str]) -> None:
    """Raises InputError for a `--config.PATH` that names no option, with the nearest one that exists."""
    for argument in argv:
        if not argument.startswith(("--config.", "-config.")):
            continue
        names = argument.split("=")[0].split(".")[1:]
        parent: type = Config
        for depth, name in enumerate(names):
            options = typing.get_type_hints(parent) if dataclasses.is_dataclass(parent) else {}
            if name not in options:
                path = ".".join(["config", *names[:depth]])
                raise InputError(f"{path} has no option {name!r}; {nearest(name, options)}")
            parent = options[name]

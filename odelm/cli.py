"""Runs a program: parses its flags, and reports a user's mistake in one line with status 2."""

import dataclasses
import os
import platform
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import jax
from absl import app, flags, logging

from odelm import config as configs
from odelm.config import Config, check_option, parse_value, replace
from odelm.errors import InputError, nearest
from odelm.files import fingerprint

OVERRIDE = "override"
"""The flag that holds what was given as `--config.PATH=VALUE`."""

COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "~/.cache/odelm/compiled",
    "Where compiled programs are kept; empty turns it off. JAX_COMPILATION_CACHE_DIR takes precedence.",
)


def run(main: Callable[[], None], argv: list[str], usage: str) -> int:
    """Parses the flags of `argv`, calls `main`, and returns the exit status.

    A mistake in the input is one line on stderr and status 2, without a traceback; `--help` prints `usage` and
    the flags. Any other exception is a defect of ours and keeps its traceback.
    """
    app.define_help_flags()
    sys.modules["__main__"].__doc__ = usage
    try:
        extra = flags.FLAGS([argv[0], *with_overrides(argv[1:])])
        if len(extra) > 1:
            raise InputError(f"{extra[1]!r} is not a flag; flags look like --name=value")
        # Orbax warns of what is normal here; a mistake should be the only line that is seen.
        logging.set_verbosity(logging.ERROR)
        _ignore_late_reads()
        use_compilation_cache(COMPILATION_CACHE.value)
        main()
    except (InputError, flags.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def use_compilation_cache(directory: str | None) -> None:
    """Lets JAX keep compiled programs in a directory, unless its environment variable names one already."""
    if not directory or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    # A program compiled for another processor may use instructions that this one lacks.
    place = Path(directory).expanduser() / fingerprint(platform.machine(), _processor_features())
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _processor_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _ignore_late_reads() -> None:
    """Keeps quiet about reads of a damaged checkpoint that end after Orbax has closed their event loop."""
    report = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    # It stays for the rest of the process: such an object may be freed after the error was reported.
    sys.unraisablehook = hook


def with_overrides(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with `--config.PATH=VALUE` (or `--config.PATH VALUE`) as values of the flag `override`."""
    found, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, given, value = argument.partition("=")
        if name.startswith(("--config.", "-config.")):
            path = name.lstrip("-").removeprefix("config.")
            if not given:
                check_option(path)
                value = "true" if not rest or re.match("-+[a-zA-Z]", rest[0]) else rest.pop(0)
            argument = f"--{OVERRIDE}={path}={value}"
        found.append(argument)
    return found


def overridden(config: Config, overrides: Iterable[str]) -> Config:
    """Returns the config with the options given as PATH=VALUE; InputError for an unknown path or an unfit value."""
    hints = dict(configs.options())
    values = {}
    for override in overrides:
        path, _, text = override.partition("=")
        check_option(path)
        try:
            values[path] = parse_value(text, hints[path])
        except ValueError as error:
            raise InputError(f"--config.{path}: {error}") from error
    return replace(config, values)


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

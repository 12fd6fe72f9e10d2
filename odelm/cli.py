"""Running a program: flags parsed, mistakes told in one line with status 2."""

import dataclasses
import sys
import typing
from collections.abc import Callable, Sequence

from absl import app, flags, logging

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
        check_overrides(argv)
        # An override is only understood after the recipe that it overrides, wherever the user put it.
        argv[1:] = sorted(argv[1:], key=lambda argument: not argument.startswith("--config="))
        extra = _parsed(argv)
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


def _parsed(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except OSError as error:
        raise InputError(f"the recipe cannot be read: {error}") from error


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

"""The command line of `train.py` and `infer.py`: flags, help, and mistakes told in one line."""

import errno
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from logging import CRITICAL, getLogger
from pathlib import Path

from absl import flags, logging

from odelm import config as configs
from odelm.config import Config, check_option, parse_value, replace
from odelm.config.describe import shown
from odelm.errors import InputError, RunFailure, is_out_of_memory
from odelm.files import fingerprint
from odelm.interrupts import FAILED, interrupted

LESS_MEMORY = "try a smaller batch or shorter texts, or a device with more memory"
"""What may help where the memory is not enough, whatever the program."""
HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")
WIDTH = 100
REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR})
"""What the system says of a path that cannot be used as it was given, whatever a program does with it."""


def new_flags() -> flags.FlagValues:
    """Returns the flags that every program has; a program's are its own, so that two can be used in one process."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "compilation_cache",
        "~/.cache/odelm/compiled",
        "Where compiled programs are kept; empty turns it off. JAX_COMPILATION_CACHE_DIR takes precedence.",
        flag_values=values,
    )
    return values


def run(
    main: Callable[[], int],
    values: flags.FlagValues,
    arguments: Sequence[str],
    usage: str,
    options: str = "",
    *,
    less_memory: str = LESS_MEMORY,
) -> int:
    """Parses the arguments, calls `main`, and returns its exit status.

    With one of `HELP` it prints `usage`, the flags and `options` instead. A mistake is told as `told_in_one_line` does.
    """
    if any(argument in HELP for argument in arguments):
        print(f"{usage.strip()}\n\nFlags:\n{as_help(values)}\n\n{options}".rstrip())
        return 0

    def parsed() -> int:
        parse(values, arguments)
        _ignore_late_reads()
        use_compilation_cache(values.compilation_cache)
        return main()

    return told_in_one_line(parsed, less_memory)


def told_in_one_line(main: Callable[[], int], less_memory: str = LESS_MEMORY) -> int:
    """Returns the exit status of `main`; a mistake in the input is one line on stderr and status 2, a run that cannot
    continue one line and status 1. A path that the system refuses, such as one in a folder of another user, and more
    memory than there is are mistakes in the input too; `less_memory` is the advice for the latter.

    Any other exception is a defect of ours and keeps its traceback.
    """
    # TFDS and Orbax warn of what is normal here, and report errors that they raise too, some for every array; what went
    # wrong should be the only line that is seen.
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)
    try:
        return main()
    except (InputError, flags.Error) as error:
        if interrupted():
            raise KeyboardInterrupt from error
        return _refused(str(error))
    except OSError as error:
        if error.filename is None or error.errno not in REFUSED:
            raise
        return _refused(f"{error.filename} cannot be used ({error.strerror}): give another path, or change its rights")
    except RunFailure as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _refused(f"out of memory{_amount(str(error))}; {less_memory}")


def _amount(told: str) -> str:
    """Returns how much memory was asked for, as a part of a sentence; nothing where NumPy or JAX does not say it."""
    found = re.search(r"allocat\w*\s+(?:memory of\s+|request for\s+)?(\d+(?:\.\d+)?)\.?\s*(bytes|[KMGTPE]i?B)", told)
    if not found:
        return ""
    size, unit = found.groups()
    amount = f"{float(size) / 2**30:,.1f} GiB" if unit == "bytes" else f"{size} {unit}"
    return f": {amount} was asked for at once"


def _refused(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def parse(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Gives the flags their values, whatever they had before; raises InputError for what is no flag."""
    for name in values:
        values[name].unparse()
    extra = values(["", *with_overrides(arguments)])
    if len(extra) > 1:
        raise InputError(f"{extra[1]!r} is not a flag; flags look like --name=value")


def as_help(values: flags.FlagValues) -> str:
    """Returns the flags, each with its default and its meaning."""
    lines = []
    for name in sorted(values):
        flag = values[name]
        if name != flag.name or name == "override":
            continue
        lines.append(f"  --{name}" if flag.default is None else f"  --{name}={shown(flag.default)}")
        lines += textwrap.wrap(flag.help or "", WIDTH, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return "\n".join(lines)


def use_compilation_cache(directory: str | None) -> None:
    """Lets JAX keep programs that took 0.2 s to compile in a directory, unless its environment variables name another
    directory or another time."""
    if not directory or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    import jax

    # A program compiled for another processor may use instructions that this one lacks.
    place = Path(directory).expanduser() / fingerprint(platform.machine(), _processor_features())
    jax.config.update("jax_compilation_cache_dir", str(place))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
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
            argument = f"--override={path}={value}"
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

"""Measurements: each module is a program, `python -m benchmarks.NAME --help`."""

import sys
from collections.abc import Callable


def run_program(main: Callable[[], int | None]) -> None:
    """Ends the process with the status of `main`; a mistake in the input is one line and status 2."""
    from odelm.programs.command_line import told_in_one_line

    sys.exit(told_in_one_line(lambda: main() or 0))

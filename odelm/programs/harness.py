"""Runs lm-eval's command line with the model `odelm` registered: `python -m odelm.evals.harness`."""

from collections.abc import Sequence
from importlib.util import find_spec

from odelm.errors import InputError
from odelm.programs.command_line import told_in_one_line


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status; a mistake is one line on stderr and status 2. lm-eval reads `sys.argv` itself."""
    return told_in_one_line(_evaluate)


def _evaluate() -> int:
    if find_spec("lm_eval") is None:
        raise InputError("this runs lm-eval, which is not installed: pip install 'odelm[harness]'")
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    import odelm.evals.harness  # noqa: F401, which registers the model

    cli_evaluate()
    return 0

"""Runs `odelm.programs.evals`; `python -m odelm.evals --help` shows what it takes."""

import sys

from odelm.programs import launch

if __name__ == "__main__":
    sys.exit(launch.evals())

"""Runs `odelm.programs.interop`; `python -m odelm.interop --help` shows what it takes."""

import sys

from odelm.programs import launch

if __name__ == "__main__":
    sys.exit(launch.interop())

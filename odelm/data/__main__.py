"""Runs `odelm.programs.data`; `python -m odelm.data --help` shows what it takes."""

import sys

from odelm.programs import launch

if __name__ == "__main__":
    sys.exit(launch.data())

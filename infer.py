"""Runs `odelm.programs.infer`; `python infer.py --help` shows what it takes."""

import sys

from odelm.programs import launch

if __name__ == "__main__":
    sys.exit(launch.infer())

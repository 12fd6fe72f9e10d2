"""Runs `odelm.programs.harness`: lm-eval, with the model `odelm` registered."""

import sys

from odelm.programs import launch

if __name__ == "__main__":
    sys.exit(launch.harness())

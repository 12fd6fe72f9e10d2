"""Prints docs/options.md: `python -m odelm.config > docs/options.md`."""

from odelm.config import Config
from odelm.config.describe import as_markdown

if __name__ == "__main__":
    print(as_markdown(Config()), end="")

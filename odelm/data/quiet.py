"""TFDS without its bars and notes: `odelm.data.prepare` reports in its own way."""

import contextlib
import io
import logging
from collections.abc import Iterator

import tensorflow_datasets as tfds


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences TFDS's bars, notes and printing."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

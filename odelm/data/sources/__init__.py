"""Where documents come from: files, archives and the TFDS catalogue, and what a damaged one means.

The four corpora are TFDS builders; TFDS is imported when one of them is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from odelm.data.sources.corpora import OpenWebText, Pile, PythonSource, Text

__all__ = ["OpenWebText", "Pile", "PythonSource", "Text"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from odelm.data.sources import corpora

    return getattr(corpora, name)

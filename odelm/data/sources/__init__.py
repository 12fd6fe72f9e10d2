"""Where documents come from: files, archives and the TFDS catalogue, and what a damaged one means.

The four corpora, `OpenWebText`, `Pile`, `PythonSource` and `Text`, are TFDS builders; TFDS is imported when one of them
is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from odelm.data.sources.corpora import OpenWebText as OpenWebText
    from odelm.data.sources.corpora import Pile as Pile
    from odelm.data.sources.corpora import PythonSource as PythonSource
    from odelm.data.sources.corpora import Text as Text

_BUILDERS = ("OpenWebText", "Pile", "PythonSource", "Text")


def __getattr__(name: str) -> Any:
    if name not in _BUILDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from odelm.data.sources import corpora

    return getattr(corpora, name)

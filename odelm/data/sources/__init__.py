"""Where documents come from: files, archives and the TFDS catalogue, and how damaged ones are handled.

The four corpora, `OpenWebText`, `Pile`, `PythonSource` and `Text`, are TFDS builders; TFDS is imported when one of them
is asked for.
"""

from typing import TYPE_CHECKING

from odelm.lazy import importer

if TYPE_CHECKING:
    from odelm.data.sources.corpora import OpenWebText as OpenWebText
    from odelm.data.sources.corpora import Pile as Pile
    from odelm.data.sources.corpora import PythonSource as PythonSource
    from odelm.data.sources.corpora import Text as Text

__getattr__ = importer(__name__, {"odelm.data.sources.corpora": "OpenWebText Pile PythonSource Text"})

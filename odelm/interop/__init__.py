"""Hugging Face folders in and out, and models between shared and unshared. Nothing of transformers is needed."""

from typing import TYPE_CHECKING

from odelm.lazy import importer

if TYPE_CHECKING:
    from odelm.interop.convert import shared, summary, unrolled
    from odelm.interop.folder import is_folder
    from odelm.interop.reader import load, read
    from odelm.interop.writer import export

__all__ = ["export", "is_folder", "load", "read", "shared", "summary", "unrolled"]

_MODULES = {
    "odelm.interop.convert": "shared summary unrolled",
    "odelm.interop.folder": "is_folder",
    "odelm.interop.reader": "load read",
    "odelm.interop.writer": "export",
}

__getattr__ = importer(__name__, _MODULES)

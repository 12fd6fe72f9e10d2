"""Hugging Face folders in and out, and models between shared and unshared. Nothing of transformers is needed."""

from odelm.interop.convert import shared, summary, unrolled
from odelm.interop.folder import is_folder
from odelm.interop.read import load, read
from odelm.interop.write import export

__all__ = ["export", "is_folder", "load", "read", "shared", "summary", "unrolled"]

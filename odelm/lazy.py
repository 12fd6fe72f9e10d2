"""Names of a package that are imported when they are asked for.

So a program can set up its signal handling, and show its help, before JAX is imported, which takes seconds.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def importer(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns the `__getattr__` of a package; `modules` has the names that each module gives, separated by spaces.

    A module may be one of these names itself, but not that of a function in it: importing the module would take the
    function's place.
    """
    places = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(places[name])
        found = module if places[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, found)
        return found

    return get

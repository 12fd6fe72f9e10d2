"""Names of this library that its docstrings and comments refer to exist."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = re.compile(r"`(odelm(?:\.\w+)+)\b[^`\n]*`")


def references() -> list[tuple[str, str]]:
    """Returns (file:line, name) for every name in backticks."""
    found = []
    for path in sorted([*ROOT.glob("odelm/**/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("*.py")]):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            found += [(f"{path.relative_to(ROOT)}:{number}", name) for name in REFERENCE.findall(line)]
    return found


def test_references_are_found():
    assert len(references()) > 10


@pytest.mark.parametrize(("place", "name"), references())
def test_a_reference_in_a_docstring_exists(place, name):
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{place} refers to `{name}`, which does not exist: {error}")

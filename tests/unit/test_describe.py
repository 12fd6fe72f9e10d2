"""Every option says what it means, wherever a user may look for it."""

import dataclasses
import pydoc
import sys
from pathlib import Path
from types import ModuleType

import pytest

from odelm.config import Config, describe, options
from odelm.programs import train

ROOT = Path(__file__).parents[2]
PARTS = [type(getattr(Config(), part.name)) for part in dataclasses.fields(Config)]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_option_has_a_meaning_that_help_shows(part):
    shown = " ".join(pydoc.plain(pydoc.render_doc(part)).replace("|", " ").split())
    for option in describe.options_of(part):
        assert option.meaning.endswith("."), f"{part.__name__}.{option.name} says {option.meaning!r}"
        assert " ".join(option.meaning.replace("|", " ").split()) in shown
        assert f" {option.name}: " in shown


def test_help_of_training_has_every_option(capsys):
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    missing = [path for path, _ in options() if f"  --config.{path}=" not in shown]
    assert not missing and "--workdir" in shown


def test_values_are_shown_as_they_are_given():
    shown = [describe.shown(value) for value in (None, (), (3, 6), True, 1e-3, "a b")]
    assert shown == ["none", "", "3,6", "true", "0.001", "a b"]


def test_the_document_of_options_is_made_from_them():
    made = describe.as_markdown(Config())
    assert (ROOT / "docs" / "options.md").read_text() == made, "run `python -m odelm.config > docs/options.md`"
    missing = [path for path, _ in options() if f"- `{path}`, " not in made]
    assert not missing


def test_a_class_without_source_has_options_without_meanings():
    scope: dict = {"__name__": "made.up"}
    exec("from dataclasses import dataclass\n@dataclass\nclass Part:\n    size: int = 3\n", scope)
    sys.modules["made.up"] = ModuleType("made.up")
    try:
        assert [(o.name, o.type, o.default, o.meaning) for o in describe.options_of(scope["Part"])] == [
            ("size", "int", 3, "")
        ]
    finally:
        del sys.modules["made.up"]

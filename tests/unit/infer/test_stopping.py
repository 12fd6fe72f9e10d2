"""Where texts end, and what of a growing one is sure."""

import pytest

from odelm.errors import InputError
from odelm.infer.stopping import certain, cut, stop_strings


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", [], ("one two three", False)),
        ("one two three", ["four"], ("one two three", False)),
        ("one two three", ["three", "two"], ("one ", True)),
        ("two", ["two"], ("", True)),
        ("aab", ["ab", "aab"], ("", True)),
    ],
)
def test_a_text_ends_before_the_first_of_its_stop_strings(text, stop, expected):
    assert cut(text, stop) == expected


@pytest.mark.parametrize(
    ("text", "stop", "sure"),
    [
        ("one tw", ["two"], "one "),
        ("one t", ["two"], "one "),
        ("one", ["two"], "one"),
        ("a\n", ["\n\n", "\n\nb"], "a"),
        ("ab a", ["ab ab", " a"], ""),
        ("caf\ufffd", [], "caf"),
        ("caf\ufffd\ufffd", ["x"], "caf"),
        ("a\ufffdb", [], "a\ufffdb"),
    ],
)
def test_what_may_begin_a_stop_string_or_a_character_is_not_sure(text, stop, sure):
    assert certain(text, stop) == sure


def test_a_growing_text_never_takes_back_what_was_sure():
    whole, stop = "the \ufffd end of the ending", ["ending", "d o", "zz"]
    shown = []
    for n in range(len(whole)):
        text, ended = cut(whole[:n], stop)
        shown.append(text if ended else certain(text, stop))
    assert all(after.startswith(before) for before, after in zip(shown, shown[1:], strict=False))
    assert shown[-1] == cut(whole, stop)[0] == "the \ufffd en"


def test_one_string_may_stand_alone():
    assert stop_strings("ab", has_tokenizer=True) == ["ab"] and stop_strings([], has_tokenizer=False) == []


@pytest.mark.parametrize("stop", ["", [""], [3], ["a", None], None, 3])
def test_what_is_no_string_is_refused(stop):
    with pytest.raises(InputError, match="expected strings of at least one character"):
        stop_strings(stop, has_tokenizer=True)

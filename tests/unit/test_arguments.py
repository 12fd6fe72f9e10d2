"""Arguments of calls: what is taken, and what an error says of the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odelm.arguments import listed, number, of_class, whole, wholes
from odelm.errors import InputError


def test_numbers_of_every_library_are_taken():
    for three in (3, np.int64(3), np.array(3), jnp.int32(3)):
        assert type(whole("n", three)) is int and whole("n", three) == 3
        assert number("x", three, lambda x: x > 0, "above 0") == 3.0
    assert wholes("n", np.arange(1, 3)) == [1, 2] and wholes("n", iter([5])) == [5]
    assert whole("n", 0, least=0, most=0) == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), ("8", "'8'"), (None, "None"), (True, "True"), (2.5, "2.5"), (np.int64(-1), "-1"), ("x" * 99, "'x{59}")],
)
def test_what_is_no_whole_number_is_refused(value, words):
    with pytest.raises(InputError, match=f"^steps is {words}, expected a whole number of at least 1$"):
        whole("steps", value)
    with pytest.raises(InputError, match=rf"^steps\[1\] is {words}, expected a whole number of at least 1$"):
        wholes("steps", [1, value])


def test_ranges_are_named():
    with pytest.raises(InputError, match=r"^seed is 9, expected a whole number from 0 to 8$"):
        whole("seed", 9, least=0, most=8)
    with pytest.raises(InputError, match=r"^top is 9, expected 1 to model.vocab_size, 8$"):
        whole("top", 9, most=8, expected="1 to model.vocab_size, 8")


def test_a_traced_number_must_be_known():
    with pytest.raises(InputError, match="expected a whole number of at least 1, known when the code is traced"):
        jax.jit(lambda n: whole("steps", n))(3)


@pytest.mark.parametrize(
    ("value", "words"), [("hot", "'hot'"), (None, "None"), (True, "True"), (-1, "-1"), ([], r"\[\]")]
)
def test_what_is_no_number_is_refused(value, words):
    with pytest.raises(InputError, match=f"^temperature is {words}, expected 0 or more$"):
        number("temperature", value, lambda x: x >= 0, "0 or more")
    with pytest.raises(InputError, match="^temperature is nan"):
        number("temperature", float("nan"), lambda x: not x < 0, "0 or more")


def test_lists_have_an_order_and_a_value():
    assert listed("texts", (text for text in "ab"), "a list") == ["a", "b"]
    for value in (None, 3, "ab", b"ab", {"a"}, {"a": 1}, np.array(3)):
        with pytest.raises(InputError, match="^texts is .*, expected a list$"):
            listed("texts", value, "a list")
    with pytest.raises(InputError, match="^texts is empty: give at least one$"):
        listed("texts", (), "a list")


def test_a_value_of_another_class_is_named_by_its_class():
    of_class("model", 3, int, "a number")
    for value, words in ((None, "None"), ("a", "'a'"), ((1, 2), "a tuple")):
        with pytest.raises(InputError, match=f"^model is {words}, expected a number$"):
            of_class("model", value, int, "a number")

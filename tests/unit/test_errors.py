"""The hint that names the nearest choice."""

from odelm.errors import InputError, nearest


def test_nearest_names_the_closest_and_lists_all():
    assert nearest("hune", ["midpoint", "heun", "euler"]) == "did you mean 'heun'? choices: euler, heun, midpoint"


def test_nearest_does_not_guess_from_afar():
    assert nearest("xyz", ["midpoint", "heun"]) == "choices: heun, midpoint"


def test_nearest_takes_what_is_no_name():
    assert nearest(None, ["midpoint", "heun"]) == "choices: heun, midpoint"


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)

"""What is reported of a run that goes wrong."""

import math

import numpy as np
import pytest

from odelm.data.tokens import Prepared, Stream
from odelm.train.health import RECORDS, Losses, collapsed, token_entropy


def test_a_loss_that_jumps_is_reported_once():
    losses = Losses()
    falling = [6 - 0.1 * i for i in range(RECORDS + 3)]
    assert [losses.jumped(loss) for loss in falling] == [None] * len(falling)
    assert "jumped to 7.500" in (losses.jumped(7.5) or "")
    assert losses.jumped(7.6) is None and losses.jumped(None) is None
    assert Losses().jumped(99.0) is None


def test_losses_at_the_entropy_of_token_frequencies_are_a_collapse():
    assert "predicts no more than token frequencies do (5.000" in (collapsed({12: 5.01, 3: 4.99}, 5.0) or "")
    assert collapsed({12: 5.01, 3: 4.5}, 5.0) is None and collapsed({}, 5.0) is None


def test_the_entropy_is_that_of_the_frequencies():
    streams = {name: Stream(np.array(tokens, np.uint16), np.array([len(tokens)])) for name, tokens in
               {"a": [1, 1, 2, 3], "b": [2, 3, 3, 3]}.items()}  # fmt: skip
    shares = np.array([2, 2, 4]) / 8
    prepared = Prepared(None, streams, {}, 1.0, None, "")
    assert token_entropy(prepared) == pytest.approx(-(shares * np.log(shares)).sum())
    assert token_entropy(prepared) < math.log(3)

"""The summary printed at the end of a run, and the figure of its evaluations."""

import pytest

from odelm.train.behaviour import Behaviour
from odelm.train.curve import draw_curve


def test_records_are_summed_up():
    behaviour = Behaviour()
    assert behaviour.summary() is None
    behaviour.add(dict(loss=None, tokens_per_s=100.0, data_wait=0.5, skipped=10), updates=10, tokens=1000, jumped=False)
    behaviour.add(dict(loss=6.0, tokens_per_s=50.0, data_wait=0.0), updates=10, tokens=1000, jumped=False)
    behaviour.add(dict(loss=5.5, tokens_per_s=200.0, data_wait=0.0), updates=20, tokens=2000, jumped=True)
    assert behaviour.summary() == (
        "40 updates in 40 s: 100 tokens/s, 12.5% of the time waiting for data, loss 6.000 at first and 5.500 at last; "
        "10 updates skipped, 1 jumps of the loss"
    )


def test_the_newest_evaluations_are_drawn():
    evaluations = {update: {12: 4.0, 3: 4.5, 6: 4.2} for update in range(0, 1000, 100)}
    (axes,) = draw_curve(evaluations, shown=3).axes
    assert [line.get_label() for line in axes.lines] == ["update 700", "update 800", "update 900"]
    assert list(axes.lines[0].get_xdata()) == [3, 6, 12]
    assert axes.lines[-1].get_ydata() == pytest.approx([4.5, 4.2, 4.0])

"""Two models at equal latency."""

import numpy as np
import pytest

from odelm.errors import InputError
from odelm.evals.baseline import _check_comparable, at_equal_latency


def rows(*points):
    return [{"latency_ms": {"median": latency}, "loss": loss, "batch": 1, "length": 8} for latency, loss in points]


def test_the_other_is_read_at_the_same_latency():
    found = at_equal_latency(rows((1.0, 9.0), (2.0, 9.0), (3.0, 9.0), (5.0, 9.0)), rows((4.0, 3.0), (2.0, 5.0)))
    assert [row["other_loss"] for row in found] == [None, 5.0, 4.0, None]


def test_what_cannot_be_compared_is_told(make_model):
    class Named:
        def __init__(self, text):
            self.text = text

        def to_str(self):
            return self.text

    decoder, encoder = make_model(), make_model(kind="encoder")
    one = (decoder, _config(decoder), Named("a"))
    with pytest.raises(InputError, match="runs/b is another kind of model"):
        _check_comparable(one, (encoder, _config(encoder), Named("a")), "runs/b")
    with pytest.raises(InputError, match="runs/b has another tokenizer"):
        _check_comparable(one, (decoder, _config(decoder), Named("b")), "runs/b")
    _check_comparable(one, (decoder, _config(decoder), Named("a")), "runs/b")


def _config(model):
    import odelm

    return odelm.Config(model=model.config)


def test_the_plot_and_the_numbers_are_of_both(tmp_path):
    from odelm.evals.baseline import plot

    report = {"rows": rows((1, 4.0), (2, 3.9)), "baseline_rows": rows((1, 4.1), (3, 3.8)), "baseline": "b"}
    plot(report | {"device": "cpu"}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"
    assert np.isclose(at_equal_latency(report["rows"], report["baseline_rows"])[1]["other_loss"], 3.95)

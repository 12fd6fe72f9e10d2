"""A run written by the first version still loads and computes what it did then.

`tests/fixtures/*_0_1` were trained by it for six updates; `losses.json` has the losses that it gave on stored tokens.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import odelm
from tests.calls import compiled

FIXTURES = Path(__file__).parents[1] / "fixtures"
RUNS = ("decoder_0_1", "encoder_0_1")


def stored(run: str) -> dict:
    return json.loads((FIXTURES / run / "losses.json").read_text())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("row", range(4))
def test_an_older_run_gives_the_losses_that_it_had(run, row):
    model, config, tokenizer = odelm.load(FIXTURES / run)
    data = stored(run)
    tokens, mask, then = np.array(data["tokens"], np.int32), np.array(data["mask"]), data["rows"][row]
    logits = np.asarray(compiled(model)(tokens, mask=mask, steps=then["steps"], solver=then["solver"]), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    if config.model.kind == "decoder":
        predicted, tokens, mask = log_probabilities[:, :-1], tokens[:, 1:], mask[:, 1:]
    else:
        predicted = log_probabilities
    loss = -np.take_along_axis(predicted, tokens[..., None], -1)[..., 0][mask].mean()
    # Two stacks of JAX round float32 sums of a few hundred terms in another order.
    np.testing.assert_allclose(loss, then["loss"], rtol=1e-5)
    np.testing.assert_allclose(np.abs(logits).sum(), then["logits_sum"], rtol=1e-5)
    assert tokenizer is not None and tokenizer.get_vocab_size() <= config.model.vocab_size

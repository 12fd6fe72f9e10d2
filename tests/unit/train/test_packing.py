"""Training on packed rows: what a document's loss is does not depend on what it is packed with."""

import jax
import numpy as np
from flax import nnx

from odelm.config import Config, replace
from odelm.data.loader import NextTokenRows
from odelm.models import create
from odelm.models.loss import loss_sums

END = 1


def rows(documents: list[np.ndarray], *, length: int) -> dict[str, np.ndarray]:
    """Returns one row of the documents, each ended, after an end token such as a document before would leave."""
    tokens = np.concatenate([[END], *(np.append(document, END) for document in documents)])
    window = {"window": np.pad(tokens, (0, length + 1 - len(tokens)))[None], "count": np.array([len(tokens)])}
    return NextTokenRows(length, END, segments=True).batch(window)


def test_the_loss_of_packed_documents_is_the_sum_of_their_own():
    """Every token but the leading end is predicted, from its own document. 1e-5 relative: float32 sums of 31 losses
    of about 4, each rounded to 2e-7 of it some ten times."""
    config = Config()
    config = replace(config, {"model.vocab_size": 40, "model.width": 32, "model.max_length": 64})
    model = create(config.model, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    documents = [random.integers(2, 40, size) for size in (5, 9, 1, 12)]
    graph, params = nnx.split(model)
    sums_of = jax.jit(lambda params, batch: loss_sums(nnx.merge(graph, params), batch))
    packed = sums_of(params, rows(documents, length=40))
    alone = [sums_of(params, rows([document], length=40)) for document in documents]
    assert float(packed.tokens) == sum(len(document) + 1 for document in documents) == 31
    assert float(packed.tokens) == sum(float(sums.tokens) for sums in alone)
    np.testing.assert_allclose(float(packed.nats), sum(float(sums.nats) for sums in alone), rtol=1e-5)
    together = {name: array for name, array in rows(documents, length=40).items() if name != "segments"}
    assert abs(float(sums_of(params, together).nats) / float(packed.nats) - 1) > 1e-3

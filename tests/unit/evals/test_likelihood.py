"""Likelihoods of texts in batches against the model called on each alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from odelm.errors import InputError
from odelm.evals import likelihood as module
from odelm.evals.likelihood import Likelihood, Scorer
from odelm.evals.tasks.evaluate import evaluate
from odelm.evals.tasks.items import Page, Passage, Question, Task
from odelm.models import Classifier
from tests.calls import compiled
from tests.thorough import thorough

LIMIT = 16
PAIRS = [
    ("", " a b c d"),
    ("a b", " c"),
    ("b a d c e f g h a b c d e f g", " h g f"),
    ("a", " b a d c e f g h a b c d e f g h a b c a"),
    ("c", " d"),
]
SENTENCES = ["a b c d", "d", " c a b e"]
# The same float32 arithmetic, fused differently, summed over up to twenty tokens.
CLOSE = dict(rtol=2e-5, atol=2e-5)


def words(*special: str) -> Tokenizer:
    """Returns a tokenizer of the words a to i and these special tokens, a text being put between [CLS] and [SEP]."""
    names = [*"abcdefghi"[: 13 - len(special)], *special]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    if "[CLS]" in special:
        ends = [(name, names.index(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


@pytest.fixture(scope="module")
def decoder(make_model):
    return make_model(max_length=LIMIT, dtype="float32")


@pytest.fixture(scope="module")
def encoder(make_model):
    return make_model(kind="encoder", max_length=LIMIT, dtype="float32", norm_placement="post")


def alone(model, steps: int, row) -> tuple[float, bool]:
    """Returns the log-probability of a row's targets, and whether they are greedy, by one call of the model."""
    logits = np.asarray(compiled(model)(jnp.asarray([list(row.tokens)], jnp.int32), steps=steps)[0], np.float64)
    logs = jax.nn.log_softmax(logits[list(row.places)])
    picked = [logs[i, target] for i, target in enumerate(row.targets)]
    return float(sum(picked)), bool((np.asarray(logs).argmax(-1) == list(row.targets)).all())


def check(scorer: Scorer, model, pairs, found) -> None:
    for steps, likelihoods in found.items():
        assert len(likelihoods) == len(pairs)
        for pair, got in zip(pairs, likelihoods, strict=True):
            rows = scorer.predictions([pair])[0]
            logs, greedy = zip(*(alone(model, steps, row) for row in rows), strict=True)
            np.testing.assert_allclose(got.log, sum(logs), **CLOSE)
            assert got.greedy == all(greedy) and got.tokens == sum(len(row.targets) for row in rows)


@pytest.mark.parametrize("batch_size", [2, thorough(1), thorough(32)])
def test_likelihoods_in_batches_are_those_of_each_text_alone(decoder, batch_size):
    scorer = Scorer(decoder, words("<|endoftext|>"), steps=(2, 4, 2), batch_size=batch_size)
    found = scorer(PAIRS)
    assert list(found) == [4, 2] and scorer.evaluations(4) == 4
    check(scorer, decoder, PAIRS, found)
    assert len(scorer.predictions(PAIRS[3:4])[0]) == 2, "a text longer than the positions must be among them"
    assert abs(found[4][0].log - found[2][0].log) > 1e-2, "step counts must differ for this to test anything"
    assert scorer([]) == {4: [], 2: []}


def test_a_text_is_greedy_if_each_of_its_tokens_is_the_likeliest(decoder):
    scorer = Scorer(decoder, words("<|endoftext|>"), steps=(4,))
    logits = compiled(decoder)(jnp.asarray([[0, 1]], jnp.int32), steps=4)[0, -1]
    names = "abcdefghi"
    best = next(id for id in np.argsort(-np.asarray(logits)).tolist() if id < len(names))
    likelihoods = scorer([("a b", f" {name}") for name in names])[4]
    likeliest = int(np.argmax([one.log for one in likelihoods]))
    assert likeliest == best
    assert [i for i, one in enumerate(likelihoods) if one.greedy] == ([best] if best == int(logits.argmax()) else [])


def test_logits_are_held_for_a_few_predictions_at_once_if_they_are_large(decoder, monkeypatch):
    tokenizer = words("<|endoftext|>")
    whole = Scorer(decoder, tokenizer, steps=(4,))(PAIRS)[4]
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * 13 * 7)
    sizes = []
    inner = module._predicted
    monkeypatch.setattr(module, "_predicted", lambda *a, **k: sizes.append(k["piece"]) or inner(*a, **k))
    pieces = Scorer(decoder, tokenizer, steps=(4,))(PAIRS)[4]
    assert sizes == [7] and sum(one.tokens for one in whole) > 3 * 7
    np.testing.assert_allclose([one.log for one in pieces], [one.log for one in whole], **CLOSE)


def test_one_program_serves_all_texts_of_a_shape(decoder):
    scorer = Scorer(decoder, words("<|endoftext|>"), steps=(2,), batch_size=4)
    scorer(PAIRS[:1] * 4)
    program: Any = module._predicted
    before = program._cache_size()
    scorer([("b", " c"), ("", " d"), ("a b", " c a"), ("c", " d d d"), ("d", " a")])
    assert program._cache_size() == before
    scorer.forward(2, 5)
    assert program._cache_size() == before


def test_step_counts_tasks_and_numbers_of_predictions_share_a_program_for_each_length(make_model):
    """Two lengths, three step counts and three tasks: two programs."""
    model = make_model(max_length=32, dtype="float32", prelude=1, coda=1, depth=6)
    scorer = Scorer(model, words("<|endoftext|>"), steps=(4, 2, 1), batch_size=2)
    questions = [Question("a b c", ("d", "d e f"), 0), Question("b", ("a", "c"), 1)] * 2
    passages = [Passage(" ".join("abcdefgh" * 3), f" {word}") for word in "abc"]
    pages = [Page(" ".join("bcade" * count), 5 * count) for count in (1, 4, 6)]
    tasks = [Task("q", questions, "q"), Task("p", passages, "p"), Task("w", pages, "w")]
    program: Any = module._predicted
    before = program._cache_size()
    rows = evaluate(scorer, tasks)
    assert program._cache_size() == before + 2
    pairs = [pair for task in tasks for item in task.items for pair in item.pairs]
    check(scorer, model, pairs, scorer(pairs))
    assert [(row["task"], row["steps"]) for row in rows if row["metric"] == "acc"] == [
        (name, steps) for name in "qp" for steps in (4, 2, 1)
    ]
    assert len({row["value"] for row in rows if row["metric"] == "word_perplexity"}) == 3, "step counts must differ"


def test_many_texts_are_tokenised_in_parts(decoder, monkeypatch):
    scorer = Scorer(decoder, words("<|endoftext|>"), steps=(4,))
    whole = scorer.predictions(PAIRS)
    monkeypatch.setattr(module, "TEXTS", 2)
    assert scorer.predictions(PAIRS) == whole == [scorer.predictions([pair])[0] for pair in PAIRS]


def test_an_encoder_scores_a_sentence_with_each_token_masked_in_turn(encoder):
    scorer = Scorer(encoder, words("[CLS]", "[SEP]", "[MASK]", "[PAD]"), steps=(4, 2), batch_size=4)
    pairs = [("", text) for text in SENTENCES]
    found = scorer(pairs)
    check(scorer, encoder, pairs, found)
    assert [one.tokens for one in found[4]] == [4, 1, 4]
    rows = scorer.predictions([("", "a b")])[0]
    assert [list(row.tokens) for row in rows] == [[9, 11, 1, 10], [9, 0, 11, 10]]


def refused(model, tokenizer, pair=None, **options) -> str:
    with pytest.raises(InputError) as error:
        scorer = Scorer(model, tokenizer, **{"steps": (2,), **options})
        scorer([pair])
    return str(error.value)


def test_mistakes_are_refused(decoder, encoder, make_config):
    ends, marked = words("<|endoftext|>"), words("[CLS]", "[SEP]", "[MASK]")
    classifier = Classifier(make_config(kind="encoder"), outputs=2, rngs=nnx.Rngs(0))
    assert "tasks are for language models" in refused(classifier, marked)
    assert "has no tokenizer.json" in refused(decoder, None)
    assert "no end token" in refused(decoder, words("[MASK]"))
    assert "no mask token" in refused(encoder, words("[PAD]"))
    assert "batch_size is 0" in refused(decoder, ends, batch_size=0)
    assert "steps" in refused(decoder, ends, steps=(0,))
    assert "has no tokens" in refused(decoder, ends, ("a", "  "))
    assert "after a context is a decoder's" in refused(encoder, marked, ("a", " b"))
    assert "18 tokens, past the model's 16 positions" in refused(encoder, marked, ("", " a" * 16))
    assert "has no tokens" in refused(encoder, marked, ("", "  "))


def test_a_likelihood_is_of_float64_sums(decoder):
    (one,) = Scorer(decoder, words("<|endoftext|>"), steps=(4,))([("", " a")])[4]
    assert isinstance(one, Likelihood) and isinstance(one.log, float) and one.log < 0

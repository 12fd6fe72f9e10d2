"""Texts embedded and filled in batches against the model called on each alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import odelm
from odelm import EncoderRunner
from odelm import tokenizer as tokenizers
from odelm.errors import InputError
from odelm.infer import encoder_runner as module
from odelm.models.parameters import parameters
from tests.calls import compiled
from tests.thorough import few

TEXTS = [[3, 1, 4], [5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2], [7, 7], [2, 12, 1, 12, 0]]
MASK = 12
SHAPE = dict(kind="encoder", max_length=40, dtype="float32")
MODELS = {
    "post": (dict(norm_placement="post", positions="learned", norm="layernorm", bias=True, groups=2), dict()),
    "pre": (dict(), dict(steps=2)),
    "ends": (dict(depth=6, prelude=1, coda=1, token_types=2, embed_dim=8), dict(grid=[0, 0.5, 2, 4])),
    "chain, heun": (dict(inner_blocks=2, layer_rank=2), dict(steps=2, solver="heun")),
    "lanes, wide": (dict(lanes=2, wide_modulation=True, positions="sinusoidal"), dict(steps=1)),
}
# The same arithmetic in float32 fused differently, over states of size 1: a few roundings at each step.
CLOSE = dict(rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def plain(make_model) -> EncoderRunner:
    return EncoderRunner(make_model(**SHAPE), steps=2)


def words(*, mask: str = "[MASK]", special: tuple[str, ...] = ()) -> Tokenizer:
    """Returns a tokenizer of the words a to l and a mask, or of less with other special tokens among them."""
    names = [*"abcdefghijkl"[: 12 - len(special)], *special, mask]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([mask, *special])
    return tokenizer


BATCHES = {f"{name}, {size}": (*model, size) for size in (2, 32) for name, model in MODELS.items()}


@pytest.mark.parametrize(
    "options, call, batch_size",
    few(BATCHES, "post, 2"),
)
def test_a_text_is_embedded_as_it_is_alone(options, call, batch_size, make_model):
    model = make_model(**SHAPE, **options)
    runner = EncoderRunner(model, **call)
    mean, first, whole = (runner.embed(TEXTS, pooling=p, batch_size=batch_size) for p in module.POOLINGS)
    assert isinstance(mean, np.ndarray) and mean.dtype == np.float32 and mean.shape == (len(TEXTS), 16)
    for row, ids in enumerate(TEXTS):
        alone = compiled(model.encode)(jnp.asarray([ids]), **call)[0]
        assert whole[row].dtype == np.float32 and whole[row].shape == (len(ids), 16)
        np.testing.assert_allclose(whole[row], alone, **CLOSE)
        np.testing.assert_allclose(first[row], alone[0], **CLOSE)
        np.testing.assert_allclose(mean[row], alone.mean(0), **CLOSE)
    assert np.abs(mean[0] - mean[3]).max() > 1e-2, "texts must differ for this to test anything"


def test_masked_places_are_filled_as_the_model_alone_would(plain):
    found = plain.fill(TEXTS, top=3, batch_size=2, mask_id=MASK)
    assert [[one.place for one in row] for row in found] == [[], [], [], [], [1, 3]]
    chances = jax.nn.softmax(compiled(plain.runner.model)(jnp.asarray([TEXTS[-1]]), plan=plain.plan)[0])
    for one in found[-1]:
        exact = chances[one.place]
        assert one.ids == tuple(np.argsort(-exact)[:3].tolist()) and one.tokens is None
        np.testing.assert_allclose(one.probabilities, exact[jnp.asarray(one.ids)], **CLOSE)
    (whole,) = plain.fill([[1, MASK]], top=13, mask_id=MASK)[0]
    assert sorted(whole.ids) == list(range(13)) and sum(whole.probabilities) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("spaces", ["in words", "apart"])
def test_a_mask_stands_for_a_word_and_the_space_before_it(plain, spaces):
    """As in training, where a token is masked that has its space; of words without spaces there is none to lose."""
    if spaces == "apart":
        assert EncoderRunner(plain.runner.model, words()).tokenizer.encode("a [MASK] b").ids == [0, 12, 1]
        return
    tokenizer = tokenizers.train(["one word and another word " * 50], vocab_size=300, max_bytes=1000)
    prepared = EncoderRunner(plain.runner.model, tokenizer).tokenizer
    cls, *ids, sep = prepared.encode("one<|mask|>and <|mask|> word").ids
    parts = [tokenizer.encode(part, add_special_tokens=False).ids for part in ("one", "and", " word")]
    mask = tokenizer.token_to_id("<|mask|>")
    assert ids == [*parts[0], mask, *parts[1], mask, *parts[2]]
    assert tokenizer.encode(" <|mask|>").ids == [tokenizer.token_to_id("Ġ"), mask], "the given one stays as it is"


def test_many_masks_in_one_text_are_all_filled(plain):
    ids = [MASK] * 37 + [1, 2]
    (together,) = plain.fill([ids], top=1, mask_id=MASK)
    assert [one.place for one in together] == list(range(37))
    exact = compiled(plain.runner.model)(jnp.asarray([ids]), plan=plain.plan)[0, :37].argmax(-1)
    assert [one.ids[0] for one in together] == exact.tolist()


def test_strings_are_tokenised_and_tokens_are_text(make_model):
    model = make_model(**SHAPE)
    runner = EncoderRunner(model, words(), steps=2)
    ids = EncoderRunner(model, steps=2)
    np.testing.assert_array_equal(runner.embed(["d b e", "f"]), ids.embed([[3, 1, 4], [5]]))
    ((one,),) = runner.fill(["d [MASK] e"], top=2)
    ((same,),) = ids.fill([[3, 12, 4]], top=2, mask_id=12)
    assert (one.place, one.ids, one.probabilities) == (1, same.ids, same.probabilities)
    assert one.tokens == tuple([*"abcdefghijkl", "[MASK]"][id] for id in one.ids)
    assert runner.fill(["d b e"]) == [[]]


def test_special_tokens_are_those_of_the_tokenizer_or_else_of_training(make_model):
    model, special = make_model(**SHAPE), ("[CLS]", "[SEP]")
    ids = EncoderRunner(model, steps=2)
    trained = words(special=special)
    runner = EncoderRunner(model, trained, steps=2)
    np.testing.assert_array_equal(runner.embed(["b c"]), ids.embed([[10, 1, 2, 11]]))
    assert trained.post_processor is None, "the caller's tokenizer is its own"
    trained.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 11)])
    trained.enable_padding(length=12)
    trained.enable_truncation(2)
    np.testing.assert_array_equal(EncoderRunner(model, trained, steps=2).embed(["b c"]), ids.embed([[1, 2, 11]]))


def test_few_programs_serve_all_lengths(make_model):
    runner = EncoderRunner(make_model(**SHAPE, depth=3), steps=1)
    programs: list[Any] = [module._encode, module._likely]
    before = [program._cache_size() for program in programs]
    for count in range(1, 9):
        for longest in range(1, 41):
            texts = [[MASK] + [1] * (longest * (i + 1) // count - 1) for i in range(count)]
            texts = [text[:longest] for text in texts]
            runner.embed(texts, pooling=module.POOLINGS[longest % 3])
            runner.fill(texts, mask_id=MASK)
    # Batches of 1, 2, 4, 8; lengths of 16, 32 and all 40.
    assert [program._cache_size() - made for program, made in zip(programs, before, strict=True)] == [12, 12]


def test_a_warm_runner_compiles_nothing_more(make_model):
    runner = EncoderRunner(make_model(**SHAPE, depth=2), steps=1)
    programs: list[Any] = [module._encode, module._likely]
    before = [program._cache_size() for program in programs]
    runner.warm_up([3, 40, 16], [1, 3], top=2)
    after = [program._cache_size() for program in programs]
    assert [now - then for now, then in zip(after, before, strict=True)] == [4, 4]
    for texts in ([[1, MASK]], [[1] * 33], [[MASK] * 2, [1], [2], [MASK, MASK]]):
        runner.embed(texts)
        runner.fill(texts, top=2, mask_id=MASK)
    assert [program._cache_size() for program in programs] == after


def test_the_plan_is_computed_once(make_model, monkeypatch):
    runner = EncoderRunner(make_model(**SHAPE), steps=2)
    runner.embed([[1, 2]])
    monkeypatch.setattr(odelm.models.SharedBlock, "condition", None)
    runner.embed([[1, 2, 3] * 9])  # another program


def test_a_dtype_of_its_own(make_model):
    model = make_model(**SHAPE)
    half = EncoderRunner(model, steps=2, dtype="bfloat16")
    assert parameters(half.runner.model)["blocks/0/attention/qkv/kernel"].dtype == jnp.bfloat16
    assert half.runner.model.config.dtype == "bfloat16" and model.config.dtype == "float32"
    exact, found = EncoderRunner(model, steps=2).embed(TEXTS), half.embed(TEXTS)
    assert isinstance(exact, np.ndarray) and isinstance(found, np.ndarray) and found.dtype == np.float32
    # bfloat16 rounds states of size 1 by 2**-9, a few times a step.
    assert 1e-4 < np.abs(found - exact).max() < 0.1
    assert half.embed([[1, 2]], pooling="none")[0].dtype == np.float32


def test_splash_attention_gets_lengths_that_it_can_take(make_config, make_model):
    shape = SHAPE | dict(max_length=256)
    model = make_model(**shape)
    graph, _ = nnx.split(odelm.create(make_config(**shape, attention="splash"), rngs=nnx.Rngs(0)))
    splash = EncoderRunner(nnx.merge(graph, nnx.state(model)), steps=1)
    np.testing.assert_allclose(splash.embed(TEXTS[:2]), EncoderRunner(model, steps=1).embed(TEXTS[:2]), **CLOSE)


def test_encoders_with_other_heads_embed_too(make_config):
    for model in (
        odelm.Encoder(make_config(**SHAPE), pooled=True, rngs=nnx.Rngs(0)),
        odelm.Classifier(make_config(**SHAPE), outputs=2, rngs=nnx.Rngs(0)),
    ):
        runner = EncoderRunner(model)
        alone = compiled(model.encode)(jnp.asarray([[1, 2]]))
        np.testing.assert_allclose(runner.embed([[1, 2]], pooling="first")[0], alone[0, 0], **CLOSE)
        runner.warm_up([3], [1])
        with pytest.raises(InputError, match=f"this model is of class {type(model).__name__}"):
            runner.fill([[1, 2]], mask_id=1)


MISTAKES = [
    ([], {}, "texts is empty"),
    ("a b", {}, "texts is a single text"),
    ([3, 1], {}, "texts is a single text"),
    ([[1], []], {}, "text 1 has no tokens"),
    ([[1], [13]], {}, "text 1 has the ids 13 to 13, expected 0 to 12"),
    ([[-1, 2]], {}, "text 0 has the ids -1 to 2"),
    ([[1], [1] * 41], {}, "text 1 has 41 tokens, more than model.max_length 40: shorten it"),
    (["a"], {}, "text 0 is a string, but there is no tokenizer"),
    ([[0.5]], {}, "text 0 is float64"),
    ([[[1]]], {}, "text 0 is int64 of shape"),
    (None, {}, "texts is None, expected a list of strings or of lists of token ids"),
    (3, {}, "texts is 3, expected a list"),
    ({"a": "b"}, {}, "texts is {'a': 'b'}, expected a list"),
    ([[1]], {"batch_size": 0}, "batch_size is 0, expected a whole number of at least 1$"),
    ([[1]], {"batch_size": True}, "batch_size is True"),
    ([[1]], {"batch_size": 2.5}, "batch_size is 2.5"),
]


@pytest.mark.parametrize(("texts", "options", "expected"), MISTAKES)
def test_mistakes_in_texts_are_told(plain, texts, options, expected):
    with pytest.raises(InputError, match=expected):
        plain.embed(texts, **options)
    with pytest.raises(InputError, match=expected):
        plain.fill(texts, mask_id=MASK, **options)


def test_a_runner_inside_jit_says_what_to_call(make_model):
    with pytest.raises(InputError, match="the model is an argument of a jitted function: call the model itself"):
        nnx.jit(lambda model: EncoderRunner(model).embed([[1, 2]]))(make_model(kind="encoder"))


def test_mistakes_in_options_are_told(plain, make_model):
    with pytest.raises(InputError, match="pooling is 'maen'; did you mean 'mean'"):
        plain.embed([[1]], pooling="maen")
    with pytest.raises(InputError, match="no tokenizer with a mask token: give mask_id"):
        plain.fill([[1]])
    with pytest.raises(InputError, match="mask_id is 13, expected 0 to 12"):
        plain.fill([[1]], mask_id=13)
    with pytest.raises(InputError, match="the tokenizer has no mask token"):
        EncoderRunner(plain.runner.model, words(mask="m")).fill(["a"])
    with pytest.raises(InputError, match="mask_id is 2.5, expected 0 to 12"):
        plain.fill([[1]], mask_id=2.5)
    for top in (0, 14, 2.5, True):
        with pytest.raises(InputError, match=f"top is {top}, expected 1 to model.vocab_size, 13"):
            plain.fill([[1]], top=top, mask_id=MASK)
    for arguments, expected in (
        (([41], [1]), r"lengths\[0\] is 41, expected 1 to model.max_length, 40"),
        (([], [1]), "lengths is empty: give at least one"),
        (([1], [0]), r"batch_sizes\[0\] is 0, expected a whole number of at least 1"),
        (([2.5], [1]), r"lengths\[0\] is 2.5"),
        (([1], [1, 2.5]), r"batch_sizes\[1\] is 2.5"),
        ((16, 1), "lengths is 16, expected whole numbers in brackets"),
        ((None, None), "lengths is None, expected whole numbers in brackets"),
        (([1], [True]), r"batch_sizes\[0\] is True"),
    ):
        with pytest.raises(InputError, match=expected):
            plain.warm_up(*arguments)
    with pytest.raises(InputError, match="this model is a decoder: odelm.Generator"):
        EncoderRunner(make_model())
    with pytest.raises(InputError, match="model is None, expected a model of odelm"):
        EncoderRunner(None)
    with pytest.raises(InputError, match="tokenizer is 'tok', expected a tokenizers.Tokenizer"):
        EncoderRunner(plain.runner.model, "tok")
    with pytest.raises(InputError, match="model.dtype is 'half'"):
        EncoderRunner(plain.runner.model, dtype="half")

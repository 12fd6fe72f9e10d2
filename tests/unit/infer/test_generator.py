"""Cached decoding against the model run over the whole text, and what is drawn against its probabilities."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

import odelm
from odelm.errors import InputError
from odelm.infer import generator as module
from odelm.infer import room
from odelm.infer.decode import Decoding, advance, prefill
from odelm.infer.drafts import Speculating
from odelm.infer.generate import generate
from odelm.infer.generator import Generator
from odelm.infer.sampling import Sampling
from odelm.models import Inputs
from odelm.models.early_exit import EarlyExit
from odelm.models.exit_pass import encode_with_exits
from tests.thorough import few

PROMPTS = [[3, 1, 4], [5], [9, 2, 6, 5, 3, 5]]
MODELS = {
    "pre": (dict(), dict(steps=2)),
    "post, groups": (dict(norm_placement="post", groups=2), dict()),
    "ends, learned": (dict(depth=6, prelude=1, coda=1, positions="learned"), dict(grid=[0, 0.5, 2, 4])),
    "chain, heun": (dict(inner_blocks=2, layer_rank=2), dict(steps=2, solver="heun")),
    "fewer key-value heads": (dict(heads=4, kv_heads=2, wide_modulation=True), dict(steps=2)),
    "lanes, wide": (dict(lanes=2, wide_modulation=True, positions="sinusoidal"), dict(steps=1)),
}


def varied(make_config, randomise, *, scale: float = 1.0, **options):
    """Returns a model so far from its initialisation that it does not repeat one token."""
    shape = dict(dtype="float32", tie_readout=False, max_length=32, **options)
    return randomise(odelm.create(make_config(**shape), rngs=nnx.Rngs(0)), scale=scale)


@pytest.fixture(scope="module")
def plain(make_config, randomise) -> Generator:
    return Generator(varied(make_config, randomise), steps=2)


@pytest.fixture(scope="module")
def worded(make_config, randomise) -> Generator:
    """Returns the same with a tokenizer of the words a to l, and an end."""
    words = {name: i for i, name in enumerate([*"abcdefghijkl", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Generator(varied(make_config, randomise), tokenizer, steps=2)


@pytest.mark.parametrize("options, call", few(MODELS, "post, groups", "ends, learned"))
def test_a_memory_gives_what_a_pass_over_the_whole_text_gives(options, call, make_config, randomise):
    """Prompts of unequal lengths at once, each against itself alone without a memory."""
    # Deeper models overflow at the scale of the others.
    scale = 0.4 if options.keys() & {"prelude", "inner_blocks", "lanes"} else 1.0
    generator = Generator(varied(make_config, randomise, scale=scale, **options), **call)
    together = generator(PROMPTS, new_tokens=7)
    for prompt, found in zip(PROMPTS, together, strict=True):
        alone = generate(generator.runner, prompt, plan=generator.plan, new_tokens=7, temperature=0)
        assert found == alone
    assert len({tuple(found) for found in together}) > 1, "rows must differ for this to test anything"
    assert np.isfinite(generator(PROMPTS, new_tokens=1, logprobs=True)[0].logprobs).all()


@pytest.mark.parametrize("measure", few(["state", "prediction"], "state"))
def test_tokens_leave_early_as_in_a_pass_over_the_whole_text(measure, make_config, randomise):
    """What each row computes does not depend on those that it waits for."""
    model = varied(make_config, randomise, scale=0.4, depth=8, prelude=1)
    plan, spent = model.plan(), []
    rule = EarlyExit(dict(state=0.7, prediction=0.4)[measure], measure)
    for prompt, one in zip(
        PROMPTS, Generator(model, early_exit=rule)(PROMPTS, new_tokens=7, logprobs=True), strict=True
    ):
        text = np.array([prompt + one.tokens[:-1]], np.int32)
        fine = np.arange(text.shape[1])[None] < len(prompt)
        hidden, counts = encode_with_exits(model, Inputs(text), plan, rule, by="token", fine=fine)
        likely = model.readout(hidden).argmax(-1)[0, len(prompt) - 1 :]
        assert likely.tolist() == one.tokens
        assert one.evaluations == [8, *counts[0, len(prompt) :].tolist()]
        spent += one.evaluations[1:]
    assert 4 <= min(spent) < max(spent) <= 8


def test_early_exits_are_alone(plain):
    model, rule = plain.runner.model, EarlyExit(0.1)
    for options in (dict(prefill_steps=2), dict(draft_steps=1)):
        with pytest.raises(InputError, match="leave out prefill_steps and the draft"):
            Generator(model, early_exit=rule, **options)
    with pytest.raises(InputError, match="Euler"):
        Generator(model, early_exit=rule, solver="heun")


def test_log_probabilities_are_those_of_the_model(plain):
    (found,) = plain([PROMPTS[0]], new_tokens=4, temperature=2.0, top_k=5, seed=3, logprobs=True)
    text = [*PROMPTS[0], *found.tokens]
    logits = plain.runner.model(jnp.asarray([text]), plan=plain.plan)[0]
    exact = jax.nn.log_softmax(logits)[jnp.arange(2, 6), jnp.asarray(found.tokens)]
    np.testing.assert_allclose(found.logprobs, exact, atol=1e-4)
    assert found.text is None


def test_rows_end_before_their_end_token_and_the_others_go_on(plain):
    whole = plain(PROMPTS, new_tokens=8)
    ended = Generator.of(plain.runner, None, plain.plan)
    ended.end = whole[0][2]
    for before, after in zip(whole, ended(PROMPTS, new_tokens=8), strict=True):
        assert after == (before[: before.index(ended.end)] if ended.end in before else before)
    assert len(ended(PROMPTS[:1], new_tokens=8)[0]) == whole[0].index(ended.end) <= 2


def test_texts_are_the_continuations_alone(worded):
    (text,) = worded(["d b e"], new_tokens=6)
    ids = generate(worded.runner, [3, 1, 4], plan=worded.plan, new_tokens=6, temperature=0, end=12)
    assert text.split() == [chr(ord("a") + token) for token in ids] and len(text.split()) > 1


def test_a_stop_string_ends_a_text_and_a_stream_grows(worded):
    prompts = ["d b e", "f"]
    whole = worded(prompts, new_tokens=20, temperature=3.0, seed=1)
    word = whole[0].split()[3]
    stopped = worded(prompts, new_tokens=20, temperature=3.0, seed=1, stop=[word])
    assert stopped[0] == whole[0][: whole[0].index(word)]
    pieces = [found[0].text for found in worded.stream(prompts, new_tokens=20, temperature=3.0, seed=1, every=4)]
    assert pieces[-1] == whole[0] and len(pieces) == 5
    assert all(after.startswith(before) for before, after in zip(pieces, pieces[1:], strict=False))


def test_the_seed_decides_the_text(plain):
    texts = [plain([PROMPTS[0]], new_tokens=8, temperature=5.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_few_programs_serve_all_lengths(plain):
    plain(PROMPTS[:1], new_tokens=3)
    programs: list[Any] = [module._prefill, module._advance]
    made = [program._cache_size() for program in programs]
    for length in range(1, 12):
        plain([list(range(length))], new_tokens=length, temperature=length / 10, top_k=length, seed=length)
    assert [program._cache_size() for program in programs] == made


def test_the_last_position_is_used(plain):
    limit = plain.runner.model.config.max_length
    assert len(plain([[1] * (limit - 3)], new_tokens=3)[0]) == 3


def test_it_works_inside_the_callers_own_jit(plain):
    graph, params = nnx.split(plain.runner.model)
    prompts, lengths = jnp.array([[3, 1, 4, 0, 0, 0], [5, 0, 0, 0, 0, 0], PROMPTS[2]]), jnp.array([3, 1, 6])

    @jax.jit
    def tokens(params):
        model, sampling = nnx.merge(graph, params), Sampling()
        plan = model.plan(steps=2)
        state = prefill(model, plan, prompts, lengths, sampling, jax.random.key(0), new_tokens=5, end=-1)
        return advance(model, plan, state, sampling, 5, end=-1).tokens

    assert tokens(params).tolist() == plain(PROMPTS, new_tokens=5)


def test_a_generator_inside_jit_says_what_to_call(plain):
    def continued(model, prompts):
        return Generator(model, steps=2)(prompts, new_tokens=2)

    with pytest.raises(InputError, match="the model is an argument of a jitted.*decode.prefill and advance"):
        nnx.jit(continued)(plain.runner.model, PROMPTS)
    with pytest.raises(InputError, match="prompts are arguments of a jitted function: call odelm.infer.decode.prefill"):
        jax.jit(lambda rows: plain(rows, new_tokens=2))(jnp.ones((2, 3), jnp.int32))


def test_what_stands_before_is_penalised(plain):
    for prompt, tokens in zip(PROMPTS, plain(PROMPTS, new_tokens=4, repetition_penalty=3.0), strict=True):
        text = list(prompt)
        for token in tokens:
            logits = np.array(plain.runner.model(jnp.asarray([text]), plan=plain.plan)[0, -1])
            before = list(set(text))
            logits[before] = np.where(logits[before] > 0, logits[before] / 3, logits[before] * 3)
            assert token == int(logits.argmax())
            text.append(token)
    assert plain(PROMPTS, new_tokens=4, repetition_penalty=3.0) != plain(PROMPTS, new_tokens=4)


@pytest.mark.parametrize("options", [dict(), dict(draft_steps=1, draft_length=2)], ids=["plain", "with drafts"])
def test_a_memory_takes_what_was_said(options, plain):
    generator = Generator(plain.runner.model, steps=2, **options)
    state = generator.begin(PROMPTS, 7, Sampling(), jax.random.key(0))
    memories = [state.memory, *([state.draft] if isinstance(state, Speculating) else [])]
    taken = sum(x.nbytes for m in memories for x in jax.tree.leaves((m.blocks, m.real, m.segments)))
    assert generator.memory_bytes(3, 6, 7) == taken


def test_decoding_ends_with_the_last_of_the_rows(make_config, randomise):
    generator = Generator(varied(make_config, randomise), steps=2)
    new, sampling = 12, Sampling()
    free = generator(PROMPTS, new_tokens=new)
    shared = set.intersection(*map(set, free))
    assert shared, "one token that every row generates is needed"
    generator.end = min(shared, key=lambda token: max(row.index(token) for row in free))
    last = max(row.index(generator.end) for row in free)
    assert 0 < last < new - 1
    state = generator._advance(generator.begin(PROMPTS, new, sampling, jax.random.key(0)), sampling, jnp.int32(new))
    assert isinstance(state, Decoding) and int(state.count) == last + 1 and state.done.all()
    assert [len(row) for row in generator(PROMPTS, new_tokens=new)] == [row.index(generator.end) for row in free]


def test_a_memory_that_does_not_fit_is_refused(plain, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda _: 1000)
    takes = "a memory of 31 positions of 3 rows, after its prompts, takes [0-9,]+ bytes, but its device has 1,000 free"
    with pytest.raises(InputError, match=takes):
        plain(PROMPTS, new_tokens=3)


def test_a_memory_may_take_what_the_machine_and_its_container_have_left(monkeypatch, tmp_path):
    device, machine = jax.devices()[0], psutil.virtual_memory()
    monkeypatch.setattr(room, "GROUP", tmp_path)
    assert 10**8 < (room.free_bytes(device) or 0) < machine.total, "what is in use is not free"
    (tmp_path / "memory.current").write_text("300\n")
    for limit, free in (("1000\n", 700), ("200\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert room.free_bytes(device) == free
    (tmp_path / "memory.max").write_text("max\n")
    assert (room.free_bytes(device) or 0) > 10**8


def test_a_dtype_of_its_own(plain):
    (found,) = Generator(plain.runner.model, steps=2, dtype="bfloat16")(PROMPTS[:1], new_tokens=4, logprobs=True)
    (exact,) = plain(PROMPTS[:1], new_tokens=4, logprobs=True)
    difference = np.abs(np.subtract(found.logprobs[0], exact.logprobs[0]))
    assert 0 < difference < 0.2


MISTAKES = [
    ("a", {}, "prompts is a single prompt"),
    ([3, 1], {}, "prompts is a single prompt"),
    ([], {}, "prompts is empty"),
    ([[]], {}, "no tokens"),
    ([[13]], {}, "ids 13 to 13, expected 0 to 12"),
    (["a"], {}, "there is no tokenizer: give lists of token ids"),
    (PROMPTS, {"new_tokens": 27}, "ask for 26 new tokens or fewer"),
    (PROMPTS, {"new_tokens": 0}, "new_tokens is 0"),
    (PROMPTS, {"temperature": float("nan")}, "temperature is nan"),
    (PROMPTS, {"top_k": -1}, "top_k is -1"),
    (PROMPTS, {"top_p": 0.0}, "top_p is 0.0"),
    (PROMPTS, {"min_p": 2.0}, "min_p is 2.0"),
    (PROMPTS, {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    (PROMPTS, {"top_k": 1.7}, "top_k is 1.7"),
    (PROMPTS, {"seed": -1}, "seed is -1"),
    (PROMPTS, {"seed": 1.5}, "seed is 1.5"),
    (PROMPTS, {"new_tokens": 2.5}, "new_tokens is 2.5"),
    ([[3.7]], {}, "prompt 0 is float64 of shape"),
    ([[3], [[4]]], {}, r"prompt 1 is int64 of shape \(1, 1\)"),
    (PROMPTS, {"stop": ""}, "stop has ''"),
    (PROMPTS, {"stop": None}, "stop has None"),
    (PROMPTS, {"every": -1}, "every is -1"),
    (PROMPTS, {"stop": "a"}, "stop has strings, but the generator has no tokenizer"),
    (None, {}, "prompts is None, expected a list of strings or of lists of token ids"),
    (3, {}, "prompts is 3, expected a list"),
    ({"a"}, {}, "prompts is {'a'}, expected a list"),
    ({"a": [1]}, {}, "prompts is {'a': .*, expected a list"),
    (iter(()), {}, "prompts is empty"),
    (PROMPTS, {"temperature": "hot"}, "temperature is 'hot', expected a number, 0 or more"),
    (PROMPTS, {"temperature": None}, "temperature is None"),
    (PROMPTS, {"top_p": None}, "top_p is None, expected a number above 0, at most 1"),
    (PROMPTS, {"top_k": True}, "top_k is True"),
    (PROMPTS, {"seed": True}, "seed is True"),
    (PROMPTS, {"new_tokens": True}, "new_tokens is True"),
    (PROMPTS, {"new_tokens": "8"}, "new_tokens is '8', expected a whole number of at least 1$"),
]


@pytest.mark.parametrize(("prompts", "options", "words"), MISTAKES)
def test_mistakes_are_told(plain, prompts, options, words):
    with pytest.raises(InputError, match=words):
        plain(prompts, **options)


def test_prompts_may_come_one_by_one(plain):
    assert plain(iter(PROMPTS), new_tokens=2) == plain(PROMPTS, new_tokens=2)


def test_what_a_generator_cannot_be_made_of_is_told(plain, make_model):
    model = plain.runner.model
    for arguments, options, words in (
        ((make_model(kind="encoder"),), {}, "this model is an encoder"),
        ((None,), {}, "model is None, expected a model of odelm"),
        (((model, None),), {}, "model is a tuple, expected a model of odelm"),
        ((model, "tok"), {}, "tokenizer is 'tok', expected a tokenizers.Tokenizer"),
        ((model,), {"draft_length": 6}, "draft_length is 6, but there are no drafts: give draft_steps or draft_grid"),
        ((model,), {"draft_confidence": 0.5}, "draft_confidence is 0.5, but there are no drafts"),
        ((model,), {"draft_steps": 1, "draft_confidence": "a"}, "draft_confidence is 'a', expected a probability"),
    ):
        with pytest.raises(InputError, match=words):
            Generator(*arguments, **options)


def test_the_bytes_of_a_memory_are_of_whole_numbers(plain):
    for sizes, words in (((-1, 10, 10), "batch is -1"), (("a", 1, 1), "batch is 'a'"), ((1, 0, 1), "longest is 0")):
        with pytest.raises(InputError, match=f"{words}, expected a whole number of at least 1"):
            plain.memory_bytes(*sizes)


class Crossing(NamedTuple):
    grid: tuple[float, ...]
    solver: str


def test_the_profile_is_used_where_nothing_else_is_said(make_config, randomise):
    model = varied(make_config, randomise)
    full = Generator(model)(PROMPTS, new_tokens=6)
    profile = Crossing((0.0, 1.0, 4.0), "heun")
    model.profile = profile
    wanted = Generator(model, grid=profile.grid, solver="heun")(PROMPTS, new_tokens=6)
    assert Generator(model)(PROMPTS, new_tokens=6) == wanted != full
    assert Generator(model, steps=4)(PROMPTS, new_tokens=6) == full
    assert Generator(model, grid=[0, 1, 2, 3, 4])(PROMPTS, new_tokens=6) == full
    assert Generator(model, solver="euler")(PROMPTS, new_tokens=6) == full

"""What decodes is chosen by the case and the card, and can be forced."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import odelm
from odelm.infer import kernel_choice
from odelm.infer.kernel_choice import ByKernel, Choice, choose
from odelm.infer.runner import Runner
from odelm.models.kernels.layout_choice import layout_of
from tests.fake_card import card, choose_on


@pytest.fixture(scope="module")
def model():
    shape = dict(kind="decoder", vocab_size=64, width=128, heads=2, depth=2, max_length=32)
    return odelm.CausalLM(odelm.ModelConfig(**shape), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("of", "asked", "expected"),
    [
        ({}, "auto", Choice("persistent")),
        ({}, "launches", Choice("launches")),
        ({"core_count": 114}, "auto", Choice("launches")),
        (
            {"compute_capability": "8.0"},
            "auto",
            Choice("xla", "kernels are for compute capability 9; this card's is 8.0"),
        ),
        ({"platform": "cpu"}, "auto", Choice("xla", "there is no GPU")),
    ],
)
def test_the_fastest_that_a_card_runs_is_chosen(monkeypatch, of, asked, expected):
    device = card(monkeypatch, **of)
    assert choose(asked, None, device) == expected
    assert choose("auto", "its heads are of 32", device) == Choice("xla", "its heads are of 32")


@pytest.mark.parametrize(
    ("shape", "options", "short", "by_warps"),
    [
        ({}, {}, True, True),
        ({}, dict(rows=4), False, False),
        ({}, dict(rows=5), True, False),
        ({}, dict(rows=32), True, False),
        ({}, dict(block_bits=8), False, False),
        ({}, dict(dtype=jnp.float32), False, False),
        (dict(width=384, heads=6), {}, False, True),
        (dict(width=640, heads=10), {}, False, True),
        (dict(feedforward=2000), {}, False, True),
    ],
)
def test_sums_are_short_and_warps_attend_where_it_was_measured(shape, options, short, by_warps):
    shape = dict(kind="decoder", vocab_size=500, width=768, heads=12, depth=4, max_length=512) | shape
    model = odelm.CausalLM(odelm.ModelConfig(**shape), rngs=nnx.Rngs(0))
    layout = layout_of(model.config, model.plan(steps=2), 256, **options)
    assert (layout.short_sums, layout.attends_by_warps) == (short, by_warps)
    assert ({"out", "down"} <= set(layout.paired)) == short


def test_several_rows_and_8_bits_are_launched_only_if_it_is_asked_for(monkeypatch):
    few, all_of_them = card(monkeypatch, core_count=114), card(monkeypatch)
    assert choose("auto", None, few) == choose("launches", None, few, one=False) == Choice("launches")
    assert choose("auto", None, few, one=False).kernel == "xla"
    assert choose("auto", None, all_of_them, one=False) == Choice("persistent")


def test_calls_that_take_turns_keep_what_a_kernel_reads_of_the_model(model, monkeypatch):
    runner, made = Runner.of(model), []
    options = [dict(sampled=True), dict(rows=4), dict(sampled=True, filtered=True)]
    layouts = iter(2 * [layout_of(model.config, model.plan(steps=2), 64, **one) for one in options])
    monkeypatch.setattr(kernel_choice, "_layout", lambda *_: next(layouts))
    monkeypatch.setattr(kernel_choice, "_matrices", lambda graph, params, layout: made.append(layout))
    for name in ("_vectors", "_advance"):
        monkeypatch.setattr(kernel_choice, name, lambda *_: None)
    kernels = ByKernel("auto", drafts=False)
    for _ in range(6):
        kernels.advance(runner, model.plan(steps=2), None, None, None, end=-1)
    assert [layout.readout_bits for layout in made] == [8, 16]


def test_drawing_among_the_likeliest_needs_the_kernel_that_stays(monkeypatch):
    device = card(monkeypatch)
    assert choose("auto", None, device, filtered=True) == Choice("persistent")
    assert "top_k" in choose("auto", None, card(monkeypatch, core_count=114), filtered=True).reason
    with pytest.raises(odelm.InputError, match="top_k, which launches do not support"):
        choose("launches", None, device, filtered=True)


def test_one_that_cannot_decode_is_refused_if_it_is_asked_for(monkeypatch):
    device = card(monkeypatch, core_count=114)
    with pytest.raises(odelm.InputError, match="114 programs at once, of the 132"):
        choose("persistent", None, device)
    with pytest.raises(odelm.InputError, match="33 rows; kernels take at most 32; kernel 'auto' takes what can"):
        choose("launches", "33 rows; kernels take at most 32", device)
    monkeypatch.setattr(kernel_choice.jax, "__version_info__", (0, 10, 2))
    assert "need jax 0.11" in choose("auto", None, device).reason


def test_xla_decodes_what_the_compiler_lacks_a_kernel_for(model, monkeypatch):
    tried = []

    def lacking(layout, *_):
        tried.append(layout)
        raise NotImplementedError("no layout inference rule for math.erf\nmore of it")

    choose_on(card(monkeypatch), monkeypatch)
    for name in ("_matrices", "_vectors"):
        monkeypatch.setattr(kernel_choice, name, lambda *_: None)
    monkeypatch.setattr(kernel_choice, "_advance", lacking)
    generator = odelm.Generator(model, dtype="bfloat16")
    found = [generator([[1, 2]], new_tokens=2) for _ in range(2)]
    assert found[0] == found[1] == odelm.Generator(model, dtype="bfloat16", kernel="xla")([[1, 2]], new_tokens=2)
    assert len(tried) == 1
    choice = generator.kernel_choice
    assert choice.kernel == "xla"
    assert choice.reason.endswith("does not compile the kernel: no layout inference rule for math.erf")
    with pytest.raises(odelm.InputError, match="'persistent' cannot decode this: jax .* does not compile the kernel"):
        odelm.Generator(model, dtype="bfloat16", kernel="persistent")([[1, 2]], new_tokens=2)


def test_a_generator_says_why_no_kernel_decoded(model):
    generator = odelm.Generator(model)
    generator([[1, 2]], new_tokens=2)
    assert generator.kernel_choice.kernel == "xla" and "bfloat16" in generator.kernel_choice.reason
    half = odelm.Generator(model, dtype="bfloat16")
    half(33 * [[1, 2]], new_tokens=2)
    assert str(half.kernel_choice) == "xla (33 rows; kernels take at most 32)"
    half([[1, 2]], new_tokens=2, top_p=0.5, temperature=1.0)
    assert "top_p" in half.kernel_choice.reason
    half([[1, 2]], new_tokens=2, repetition_penalty=1.5)
    assert "penalty" in half.kernel_choice.reason
    with jax.threefry_partitionable(False):
        half([[1, 2]], new_tokens=2, temperature=1.0)
        assert "another way" in half.kernel_choice.reason
    if jax.default_backend() == "cpu":
        half([[1, 2]], new_tokens=2, top_k=5, top_p=0.5)  # of which greedy decoding makes no use
        assert str(half.kernel_choice) == "xla (there is no GPU)"
    forced = odelm.Generator(model, dtype="bfloat16", kernel="xla")
    forced([[1, 2]], new_tokens=2)
    assert str(forced.kernel_choice) == "xla"


def test_a_name_of_no_kernel_and_drafts_by_a_kernel_are_refused(model):
    with pytest.raises(odelm.InputError, match="kernel is 'cuda', expected one of auto, persistent, launches, xla"):
        odelm.Generator(model, kernel="cuda")
    with pytest.raises(odelm.InputError, match="takes no drafts"):
        odelm.Generator(model, draft_steps=1, kernel="launches")
    with pytest.raises(odelm.InputError, match="cannot decode this: .*bfloat16"):
        odelm.Generator(model, kernel="persistent")([[1, 2]], new_tokens=2)

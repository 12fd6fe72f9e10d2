"""The kernel's arithmetic, as one program that is interpreted without a GPU, against the model's own decoding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm.infer import kernel_choice
from odelm.infer.decode import Decoding, advance, prefill
from odelm.infer.runner import Runner, with_dtype
from odelm.infer.sampling import sampling_options
from tests.thorough import few

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need jax 0.11 or later", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu

from odelm.infer.in_kernel import advance_in_kernel
from odelm.models.kernels import decode as kernels_decode
from odelm.models.kernels.decode import Kernels
from odelm.models.kernels.layout import REDUCTION_BYTES, SHARED_BYTES, SPARE_BYTES
from odelm.models.kernels.layout_choice import layout_of
from odelm.models.kernels.portions import portions
from odelm.models.kernels.supported import block_bits, unsupported
from odelm.models.kernels.tables import matrices, vectors

INTERPRETED = getattr(mosaic_gpu, "InterpretGPUParams")()  # noqa: B009 (jax 0.10 lacks it)
WORDS, NEW, PROMPT = 250, 6, 20
MODELS = {
    "default": {},
    "ends": dict(prelude=1, coda=1),
    "groups": dict(groups=2, positions="sinusoidal", activation="gelu"),
    "parallel": dict(parallel_branches=True, activation="relu"),
    "gpt2": dict(norm="layernorm", bias=True, positions="learned", qk_norm=False, time_modulation=False),
    "swiglu": dict(activation="swiglu", bias=True),
    "kv_heads": dict(kv_heads=1, norm="layernorm", bias=True, wide_modulation=True),
    "grouped": dict(width=256, heads=4, kv_heads=2, activation="relu2", feedforward=192),
    "scaled": dict(reference_depth=2, reference_width=64, wide_modulation=True, tie_readout=False, activation="silu"),
}


def model_of(**options: object) -> odelm.CausalLM:
    """Returns a small model in which no parameter is what it is initialised to."""
    shape = dict(kind="decoder", vocab_size=WORDS, width=128, heads=2, depth=4, feedforward=256, max_length=64)
    model = odelm.CausalLM(odelm.ModelConfig(**shape | {"dtype": "float32"} | options), rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(model, nnx.Param))
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, moved))
    return model


def begun(model: odelm.CausalLM, plan: tuple, *, end: int = -1, length: int = PROMPT) -> Decoding:
    """Returns the state after a prompt, which is padded at its end if it is shorter than `PROMPT`."""
    prompt = jnp.arange(PROMPT, dtype=jnp.int32)[None] * 7 % WORDS
    options = dict(new_tokens=NEW, end=end)
    return prefill(model, plan, prompt, jnp.array([length]), sampling_options(), jax.random.key(0), **options)


def in_kernel(
    model: odelm.CausalLM,
    plan: tuple,
    state: Decoding,
    until: int,
    *,
    programs: int = 1,
    end: int = -1,
    dtype: Any = jnp.float32,
    temperature: float = 0.0,
    persistent: bool | None = None,
    readout_bits: int = 16,
    chunk: int = 16,
    chunk_splits: int = 2,
    **options: Any,
) -> Decoding:
    """Decodes by one program that stays, or by launches of several or, if it is not `persistent`, of one."""
    assert unsupported(model, plan) is None
    bits = block_bits(model)
    sizes: dict[str, Any] = dict(out_slice=64, ring_slice=64, chunk=chunk, chunk_splits=chunk_splits)
    sizes["ring"] = 2 if min(readout_bits, bits) == 16 else 4  # with room for `out` in float32
    sizes |= dict(sampled=temperature > 0, readout_bits=min(readout_bits, bits), block_bits=bits, rows=len(state.last))
    sizes |= options
    layout = layout_of(model.config, plan, state.memory.room, dtype=dtype, programs=programs, **sizes)
    assert layout.readout_bits == sizes["readout_bits"], "there is no room for rounded rows"
    assert layout.halved == options.get("halved", False)
    kernels = Kernels(layout, INTERPRETED)
    sampling, stays = sampling_options(temperature=temperature), programs == 1 if persistent is None else persistent
    tables = matrices(model, layout), vectors(model, plan, layout)
    return advance_in_kernel(tables, state, sampling, until, kernels=kernels, end=end, persistent=stays)


def assert_same(found: Decoding, expected: Decoding, atol: float = 2e-5) -> None:
    """Asserts equal tokens, and all else equal up to rounding where it counts."""
    count = int(expected.count)
    assert int(found.count) == count and bool(found.done[0]) == bool(expected.done[0])
    np.testing.assert_array_equal(found.tokens[:, :count], expected.tokens[:, :count])
    np.testing.assert_allclose(found.logprobs[:, :count], expected.logprobs[:, :count], atol=atol)
    np.testing.assert_array_equal(found.last, expected.last)
    np.testing.assert_array_equal(found.positions, expected.positions)
    np.testing.assert_array_equal(found.memory.real, expected.memory.real)
    assert int(np.max(found.memory.length)) == int(np.max(expected.memory.length))
    for one, other in zip(jax.tree.leaves(found.memory.blocks), jax.tree.leaves(expected.memory.blocks), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("options", few(MODELS, "ends", "groups", "kv_heads", "parallel"))
def test_a_kernel_decodes_what_the_model_does(options):
    model = model_of(**options)
    plan = model.plan(steps=2)
    state = begun(model, plan)
    expected = advance(model, plan, state, sampling_options(), NEW, end=-1)
    assert_same(in_kernel(model, plan, state, NEW), expected)


@pytest.mark.parametrize(
    ("name", "programs"),
    few([("ends", 3), ("parallel", 5), ("swiglu", 12), ("gpt2", 1)], ("parallel", 5), ("swiglu", 12)),
)
def test_launches_of_several_programs_decode_what_the_model_does(name, programs):
    model = model_of(**MODELS[name])
    plan = model.plan(steps=2)
    state = begun(model, plan)
    expected = advance(model, plan, state, sampling_options(), 3, end=-1)
    assert_same(in_kernel(model, plan, state, 3, programs=programs, persistent=False), expected)


@pytest.mark.parametrize("parallel", few([False, True], True))
def test_launches_of_a_halved_layout_decode_what_the_model_does(parallel):
    model = model_of(width=256, heads=4, kv_heads=1, parallel_branches=parallel)
    plan = model.plan(steps=2)
    state = begun(model, plan)
    expected = advance(model, plan, state, sampling_options(), 3, end=-1)
    options = dict(programs=12, persistent=False, readout_bits=8, halved=True, out_slice=128, ring=8)
    assert_same(in_kernel(model, plan, state, 3, **options), expected, atol=2e-2)


@pytest.mark.parametrize("readout_bits", [16, 8])
def test_a_kernel_reads_nothing_that_was_there_before(monkeypatch, readout_bits):
    def poisoned(layout, **options):
        fresh = clean(layout, **options)
        spoilt = {name: jnp.full_like(x, jnp.nan if x.dtype == jnp.float32 else 7) for name, x in fresh.items()}
        return spoilt | {name: fresh[name] for name in ("arrived", "up")}

    clean = kernels_decode.begin_exchange
    model = model_of(prelude=1)
    plan = model.plan(steps=2)
    state = begun(model, plan)
    expected = advance(model, plan, state, sampling_options(), 3, end=-1)
    monkeypatch.setattr(kernels_decode, "begin_exchange", poisoned)
    found = in_kernel(model, plan, state, 3, readout_bits=readout_bits)
    assert_same(found, expected, atol=2e-5 if readout_bits == 16 else 2e-2)


@pytest.mark.parametrize("sampled", few([False, True], False))
def test_a_generator_decodes_by_a_kernel_where_one_can(monkeypatch, sampled):
    monkeypatch.setattr(kernel_choice, "INTERPRETED", INTERPRETED)
    model = model_of(parallel_branches=True, dtype="float32")
    options = dict(new_tokens=NEW, temperature=2.0 * sampled, logprobs=True)
    prompt = list(range(5, 30))
    (expected,) = odelm.Generator(model, steps=2, kernel="xla")([prompt], **options)
    generator = odelm.Generator(model, steps=2)
    (found,) = generator([prompt], **options)
    assert generator.kernel_choice == kernel_choice.Choice("persistent")
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-2)  # the readout is rounded to int8
    *_, (in_parts,) = generator.stream([prompt], every=2, new_tokens=NEW, temperature=2.0 * sampled)
    assert in_parts.tokens == expected.tokens
    generator(33 * [prompt], new_tokens=2)
    assert "33 rows; kernels take at most 32" in str(generator.kernel_choice)
    generator([prompt], new_tokens=2, temperature=1.0, top_p=0.5)
    assert "top_p" in str(generator.kernel_choice)


@pytest.mark.parametrize("top_k", few([1, 3, 40, WORDS + 5], 3))
def test_a_kernel_draws_among_the_likeliest(monkeypatch, top_k):
    monkeypatch.setattr(kernel_choice, "INTERPRETED", INTERPRETED)
    model, prompt = model_of(), list(range(5, 30))
    options = dict(new_tokens=20, temperature=3.0, top_k=top_k, logprobs=True)
    (expected,) = odelm.Generator(model, steps=1, kernel="xla")([prompt], **options)
    generator = odelm.Generator(model, steps=1)
    (found,) = generator([prompt], **options)
    assert generator.kernel_choice == kernel_choice.Choice("persistent")
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-5)
    (free,) = generator([prompt], new_tokens=20, temperature=3.0)
    assert free != expected.tokens or top_k > WORDS


def test_a_kernel_in_bfloat16_is_as_near_to_float32_as_the_model_is():
    exact = model_of(prelude=1)
    state = begun(exact, exact.plan(steps=2))
    coarse = Runner.of(with_dtype(exact, "bfloat16")).model
    plan = coarse.plan(steps=2)
    start = begun(coarse, plan)
    found = in_kernel(coarse, plan, start, NEW, dtype=jnp.bfloat16)
    written = jnp.concatenate([jnp.arange(PROMPT, dtype=jnp.int32) * 7 % WORDS, found.tokens[0]])[None, :-1]
    logits = exact(written, steps=2)[0, PROMPT - 1 :]
    chosen = jnp.take_along_axis(logits, found.tokens[0][:, None], 1)[:, 0]
    rounding = jnp.finfo(jnp.bfloat16).eps * jnp.abs(logits).max()
    assert int(state.tokens[0, 0]) == int(found.tokens[0, 0])
    assert (logits.max(-1) - chosen).max() <= rounding
    np.testing.assert_allclose(found.logprobs[0], chosen - jax.nn.logsumexp(logits, axis=-1), atol=0.5 * rounding)


def test_a_kernel_goes_on_where_it_stopped_after_a_padded_prompt():
    model = model_of(prelude=1)
    plan = model.plan(grid=[0.0, 1.0, 3.0])
    state = begun(model, plan, length=PROMPT - 7)
    expected = advance(model, plan, state, sampling_options(), NEW, end=-1)
    half = in_kernel(model, plan, state, 3)
    assert int(half.count) == 3
    assert_same(in_kernel(model, plan, half, NEW), expected)


@pytest.mark.parametrize("programs", few([1, 4], 1))
def test_a_kernel_draws_the_tokens_that_the_model_draws(programs):
    model = model_of(parallel_branches=True)
    plan = model.plan(steps=2)
    state = begun(model, plan)
    sampling = sampling_options(temperature=3.0)
    expected = advance(model, plan, state, sampling, NEW, end=-1)
    assert len(set(np.asarray(expected.tokens[0]).tolist())) > 3
    found = in_kernel(model, plan, state, 2, temperature=3.0, programs=programs)
    assert_same(in_kernel(model, plan, found, NEW, temperature=3.0, programs=programs), expected)


def test_a_kernel_stops_behind_the_end_token_and_stays_there():
    model = model_of(parallel_branches=True)
    plan = model.plan(steps=2)
    free = advance(model, plan, begun(model, plan), sampling_options(), NEW, end=-1)
    end = int(free.tokens[0, 2])
    assert end not in np.asarray(free.tokens[0, :2])
    state = begun(model, plan, end=end)
    expected = advance(model, plan, state, sampling_options(), NEW, end=end)
    assert int(expected.count) == 3
    found = in_kernel(model, plan, state, NEW, end=end)
    assert_same(found, expected)
    assert_same(in_kernel(model, plan, found, NEW, end=end), expected)


def test_what_no_kernel_takes_is_named():
    model = model_of()
    plan = model.plan(steps=2)
    assert unsupported(model, plan) is None
    assert unsupported(odelm.quantize(model, "fp8"), plan) == "it is quantised as fp8"
    assert unsupported(model, model.plan(steps=2, solver="heun")) == "the solver takes several stages"
    wide = odelm.CausalLM(odelm.ModelConfig(vocab_size=64, width=1536, heads=24, depth=2), rngs=nnx.Rngs(0))
    assert unsupported(wide, wide.plan(steps=2)) == "its width is 1536, above 1024"
    assert unsupported(odelm.quantize(wide, "int8"), wide.plan(steps=2)) is None
    narrow = model_of(heads=4)
    assert "heads are of 32, not 64" in str(unsupported(narrow, narrow.plan(steps=2)))


PARALLEL = dict(parallel_branches=True)


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ({}, {}, (8, 384, 4, True)),
        ({}, dict(by_warps=False), (8, 384, 3, False)),
        ({}, dict(out_slice=64), (8, 384, 3, False)),
        (PARALLEL | dict(prelude=1), {}, (8, 384, 4, True)),
        (PARALLEL | dict(width=256), dict(dtype=jnp.float32), (8, 256, 7, False)),
        (PARALLEL, dict(readout_bits=16), (16, 128, 5, False)),
        (PARALLEL, dict(sampled=True, filtered=True), (16, 128, 5, False)),
        (PARALLEL, dict(rows=4), (16, 128, 4, False)),
        (dict(width=1024), dict(by_warps=False), (8, 256, 3, False)),
        (dict(width=1024), {}, (8, 256, 4, True)),
        (dict(width=1536), dict(block_bits=8), (8, 384, 3, False)),
    ],
)
def test_a_layout_has_a_readout_for_which_there_is_room(shape, options, expected):
    shape = dict(kind="decoder", depth=4, max_length=1024, width=768) | shape
    shape |= dict(heads=shape["width"] // 64)
    small = odelm.CausalLM(odelm.ModelConfig(vocab_size=64, **shape), rngs=nnx.Rngs(0))
    layout = layout_of(odelm.ModelConfig(vocab_size=50_304, **shape), small.plan(steps=2), 768, **options)
    assert layout.fits
    assert (layout.readout_bits, layout.ring_slice, layout.ring, layout.by_warps) == expected
    least, free = REDUCTION_BYTES[-1], SHARED_BYTES - SPARE_BYTES - layout.shared_bytes
    assert layout.reduction_bytes == max(size for size in REDUCTION_BYTES if size <= least + free)


def test_a_layout_takes_what_it_is_told_and_chooses_the_rest():
    model = model_of()
    plan = model.plan(steps=2)
    assert layout_of(model.config, plan, 32).readout_bits == 8
    chosen = layout_of(model.config, plan, 32, readout_bits=16)
    told = layout_of(model.config, plan, 32, readout_bits=16, ring=chosen.ring - 1, out_slice=64)
    assert (told.ring, told.out_slice) == (chosen.ring - 1, 64)
    assert (chosen.ring_slice, told.ring_slice) == (128, 64)


@pytest.mark.parametrize(
    ("name", "programs"), few([(name, 1) for name in MODELS] + [("scaled", 5)], ("ends", 1), ("scaled", 5))
)
def test_a_kernel_decodes_with_matrices_of_8_bits_what_the_model_does(name, programs):
    model = odelm.quantize(model_of(**MODELS[name]), "int8")
    plan = model.plan(steps=2)
    state = begun(model, plan)
    expected = advance(model, plan, state, sampling_options(), NEW, end=-1)
    assert_same(in_kernel(model, plan, state, NEW, programs=programs), expected, atol=2e-4)


def test_a_generator_decodes_by_a_kernel_with_matrices_of_8_bits(monkeypatch):
    monkeypatch.setattr(kernel_choice, "INTERPRETED", INTERPRETED)
    model, prompt = odelm.quantize(model_of(parallel_branches=True), "int8"), list(range(5, 30))
    (expected,) = odelm.Generator(model, steps=2, kernel="xla")([prompt], new_tokens=NEW, logprobs=True)
    generator = odelm.Generator(model, steps=2)
    (found,) = generator([prompt], new_tokens=NEW, logprobs=True)
    assert str(generator.kernel_choice) == "persistent"
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-4)
    forced = odelm.Generator(model, steps=2, kernel="persistent")
    with pytest.raises(odelm.InputError, match="several rows with matrices of 8 bits"):
        forced(2 * [prompt], new_tokens=NEW)
    with pytest.raises(odelm.InputError, match="top_k with matrices of 8 bits"):
        forced([prompt], new_tokens=NEW, temperature=1.0, top_k=3)


@pytest.mark.parametrize("options", [dict(rows=2), dict(sampled=True, filtered=True), dict(readout_bits=16)])
def test_a_layout_with_matrices_of_8_bits_is_refused_what_it_cannot_do(options):
    model = model_of()
    with pytest.raises(odelm.InputError, match="one row, no top_k, and a readout of 8 bits"):
        layout_of(model.config, model.plan(steps=2), 32, block_bits=8, **options)


@pytest.mark.parametrize("width", [768, 1024, 1152, 1280, 1536])
def test_the_pieces_of_a_wide_model_are_spread_over_all_programs(width):
    """No program has more than its share, and none has two of a map where there are as many programs as pieces."""
    shape = dict(kind="decoder", depth=4, max_length=1024, width=width, heads=width // 64)
    small = odelm.CausalLM(odelm.ModelConfig(vocab_size=64, **shape), rngs=nnx.Rngs(0))
    layout = layout_of(odelm.ModelConfig(vocab_size=50_304, **shape), small.plan(steps=2), 768, block_bits=8)
    assert layout.fits
    counts = np.zeros(layout.programs, int)
    for name in ("qkv", "up", "down"):
        (portion,) = portions(layout, name)
        owners = [portion.owner(n) for n in range(layout.pieces(name))]
        counts += np.bincount(owners, minlength=layout.programs)
        assert portion.rounds == max(np.bincount(owners)) == -(-layout.pieces(name) // layout.programs)
    assert counts.max() <= -(-counts.sum() // layout.programs) + 1
    assert counts.max() == 2 if width == 1536 else counts.max() <= 3

"""Quantised models: their losses and sizes, what a calibration covers, and that they run wherever a model does."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import bundle, interop
from odelm.errors import InputError
from odelm.infer.export import forward_artifacts
from odelm.infer.generate import generate
from odelm.infer.generator import Generator
from odelm.infer.quantized import KINDS, restored, rounded, scale_of
from odelm.infer.runner import Runner, make_forward
from odelm.models import BlockField, Classifier, Encoder
from odelm.models.inputs import Inputs
from odelm.models.loss import loss_sums
from odelm.models.parameters import load_parameters, parameters
from odelm.models.ranges import input_ranges
from tests.calls import compiled, jitted
from tests.thorough import few

POST = dict(
    kind="encoder", embed_dim=8, norm="layernorm", norm_placement="post", embed_norm=True, positions="learned",
    bias=True, token_types=2, sentence_order=True,
)  # fmt: skip
MODELS = {
    "decoder": dict(),
    "encoder": POST,
    "ends": dict(depth=6, prelude=1, coda=1, embed_dim=8, layer_rank=2, bias=True),
    "groups": dict(groups=2, heads=4, kv_heads=2, wide_modulation=True),
    "lanes": dict(lanes=2, wide_modulation=True, activation="swiglu"),
    "chain": dict(inner_blocks=2, layer_rank=2, tie_readout=False),
}
BOUND = 0.05
"""Nats by which the losses of the models here may differ, which are 1.0 to 1.5. The most that was seen is 0.033, with
lanes, and 0.009 without them."""


def quantized(model, kind, tokens, **options):
    """Returns the model quantised; a static kind is calibrated on the tokens, at full depth and in two steps."""
    if KINDS[kind].inputs == "static":
        options = dict(calibration=[tokens], plan=[model.plan(), model.plan(steps=2)]) | options
    return odelm.quantize(model, kind, **options)


def batch_of(model, tokens) -> dict:
    """Returns a batch whose targets are what the model finds most likely, so that noise on its logits costs loss."""
    likely = np.asarray(compiled(model)(tokens).argmax(-1), np.int32)
    batch = {"tokens": tokens, "targets": likely, "weights": np.ones(tokens.shape, np.float32)}
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return batch if model.config.kind == "decoder" else batch | {"positions": places}


def loss(model, batch, steps: int | None = None) -> float:
    return float(jitted(lambda model: loss_sums(model, batch, plan=model.plan(steps=steps)).loss, model))


@pytest.mark.parametrize(
    "name, kind",
    few(
        [*(("decoder", kind) for kind in KINDS), *((name, "int8_static") for name in MODELS if name != "decoder")],
        ("decoder", "int8_static"),
    ),
)
def test_the_loss_is_near_that_of_the_model_and_not_with_a_wrong_scale(name, kind, make_model, tokens):
    model = make_model(dtype="float32", **MODELS[name])
    batch = batch_of(model, tokens)
    made = quantized(model, kind, tokens)
    assert made.quantization == kind and model.quantization is None
    for steps in (None, 2):
        difference = abs(loss(made, batch, steps) - loss(model, batch, steps))
        assert 0 < difference < BOUND
    scales = {name: array for name, array in parameters(made).items() if name.endswith("out/scale")}
    wrong = load_parameters(made, {name: 4 * array for name, array in scales.items()})
    assert abs(loss(wrong, batch) - loss(model, batch)) > BOUND


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_each_output_of_a_matrix_is_restored_to_its_own_precision(kind):
    chosen, rng = KINDS[kind], np.random.default_rng(0)
    matrix = rng.standard_normal((64, 3, 5), np.float32) * np.geomspace(1e-6, 1e3, 15, dtype=np.float32).reshape(3, 5)
    matrix[:, 1, 2] = 0
    scale = scale_of(jnp.asarray(matrix), (0,), chosen)
    found = restored(rounded(jnp.asarray(matrix), scale, chosen), scale)
    assert scale.shape == (1, 3, 5)
    # Half a step: of int8 that of its output's scale; of E4M3, with 3 bits of mantissa, 2^-4 of the value, and 2^-10
    # where it is subnormal. A rounding of the division and the product in float32 may come to it.
    own = np.abs(matrix).max(0, keepdims=True) / chosen.largest
    step = own / 2 if kind == "int8" else np.maximum(np.abs(matrix) * 2.0**-4, own * 2.0**-10)
    assert (np.abs(found - matrix) <= step * (1 + 1e-5)).all()
    assert not np.asarray(found)[:, 1, 2].any()


def test_what_is_too_large_for_a_calibrated_scale_becomes_the_largest_value():
    for kind in KINDS.values():
        values = rounded(jnp.array([-1e4, 1e4]), jnp.float32(1.0), kind).astype(jnp.float32)
        np.testing.assert_array_equal(values, [-kind.largest, kind.largest])


def test_ranges_are_those_of_the_inputs_at_each_time(make_model, tokens):
    model = make_model(dtype="float32")
    field, h = BlockField(model.blocks[0]), model.embed(inputs=Inputs(jnp.asarray(tokens)))
    found = jitted(lambda model: input_ranges(model, Inputs(tokens), model.plan(steps=2)), model)

    def step(block, h, t):
        condition = block.condition(t)
        return jnp.abs(block.norm1(h, affine=condition.norm1)).max(), block.step(condition, h, 2.0)[0]

    for number, t in enumerate((0.0, 2.0)):
        largest, h = jitted(partial(step, h=h, t=jnp.float32(t)), field.block)
        np.testing.assert_allclose(found["blocks/0/attention/qkv"][number, 0], largest, rtol=1e-5)
    np.testing.assert_allclose(found["head"], jnp.abs(jitted(lambda norm: norm(h), model.final_norm)).max(), rtol=1e-5)


@pytest.mark.parametrize("name", few(list(MODELS), "decoder"))
def test_ranges_are_of_every_matrix_whose_inputs_are_quantised(name, make_model, tokens):
    model = make_model(dtype="float32", **MODELS[name])
    made = quantized(model, "int8_static", tokens)
    calibrated = {name.removesuffix("/input_scale") for name in parameters(made) if name.endswith("input_scale")}
    found = jitted(lambda model: input_ranges(model, Inputs(tokens), model.plan(steps=2, solver="heun")), model)
    assert set(found) == calibrated
    evaluations = (2 // model.config.groups, 2)
    for name, largest in found.items():
        assert largest.shape == (evaluations if name.startswith("blocks") else (1, 1) if "/0/" in name else ())
        assert (largest > 0).all()
    block = "blocks/0/inner/inner" if model.config.lanes > 1 and model.config.inner_blocks > 1 else "blocks/0"
    assert any(name.startswith(block) for name in found)


def growing(make_model):
    """Returns a model whose hidden units grow along the depth, by its modulation."""
    model = make_model(dtype="float32", wide_modulation=True)
    own = parameters(model)
    name = "blocks/0/modulation/wide/bias"
    features = "blocks/0/modulation/wide/kernel"
    kernel = np.zeros(own[features].shape, np.float32)
    kernel[:, -model.config.feedforward_size :] = 6 * np.asarray(own[features])[:, :1]
    return load_parameters(model, {features: kernel, name: np.zeros(own[name].shape, np.float32)})


def test_a_calibration_covers_all_times_of_its_plans(make_model, tokens):
    model = growing(make_model)
    batch = batch_of(model, tokens)
    largest = jitted(lambda model: input_ranges(model, Inputs(tokens), model.plan()), model)
    down = np.asarray(largest["blocks/0/feedforward/down"])[:, 0]
    assert down.max() > 3 * down[0], "late times must be larger for this to test anything"
    made = quantized(model, "int8_static", tokens, plan=model.plan())
    np.testing.assert_allclose(parameters(made)["blocks/0/feedforward/down/input_scale"], down.max() / 127, rtol=1e-5)
    exact = loss(model, batch)
    assert abs(loss(made, batch) - exact) < BOUND
    # One step evaluates the block at time 0 only.
    early = quantized(model, "int8_static", tokens, plan=model.plan(steps=1))
    assert abs(loss(early, batch) - exact) > 2 * BOUND


def test_a_calibration_covers_all_batches_and_plans(make_model, tokens):
    model = make_model(dtype="float32")
    plans = [model.plan(), model.plan(steps=1)]
    rows = [tokens[:1], Inputs(tokens[1:])]
    name = "blocks/0/feedforward/down/input_scale"
    each = [
        float(parameters(odelm.quantize(model, "int8_static", calibration=[batch], plan=plan))[name])
        for batch in rows
        for plan in plans
    ]
    made = odelm.quantize(model, "int8_static", calibration=iter(rows), plan=plans)
    assert float(parameters(made)[name]) == max(each) and len(set(each)) > 1


@pytest.mark.parametrize("name", ["decoder", "chain", "encoder"])
def test_bytes_are_those_of_8_bit_matrices_and_their_scales(name, make_model):
    model = make_model(dtype="float32", **MODELS[name])
    own, made = parameters(model), odelm.quantize(model, "int8")
    whole = {name: array for name, array in own.items() if name.endswith("/kernel")}
    readout = own["embed/tokens" if model.config.tie_readout else "head/tokens"]
    small = sum(array.size for array in whole.values()) + readout.size
    assert odelm.parameter_bytes(model) == 4 * sum(array.size for array in own.values())
    scales = sum(array.size for name, array in parameters(made).items() if name.endswith("/scale"))
    norms = sum(array.size for name, array in own.items() if name.endswith("/scale"))
    assert odelm.parameter_bytes(made) == odelm.parameter_bytes(model) - 3 * small + 4 * (scales - norms)
    kept = {name for name, array in parameters(made).items() if array.dtype == jnp.int8}
    assert kept == set(whole) | {"embed/tokens" if model.config.tie_readout else "head/tokens"}


@pytest.mark.parametrize("kind", few(list(KINDS), "int8_dynamic", "fp8"))
def test_logits_and_losses_are_of_the_same_readout(kind, make_model, tokens):
    made = quantized(make_model(dtype="float32"), kind, tokens)
    h = np.random.default_rng(0).standard_normal((2, 3, 16), np.float32)

    def both(model):
        x, matrix, _ = model.head.parts(h, model.embed.tokens[...])
        return model.readout(h), x @ matrix.T

    called, by_parts = jitted(both, made)
    # Sums of 16 products in float32, of the same values.
    np.testing.assert_allclose(called, by_parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, kind",
    few(
        [
            *(("decoder", kind) for kind in KINDS),
            *((name, "int8_static") for name, options in MODELS.items() if options and options != POST),
        ],
        ("decoder", "int8_static"),
    ),
)
def test_greedy_text_is_that_of_the_quantised_model_without_a_memory(name, kind, make_config, randomise):
    config = make_config(**dict(dtype="float32", max_length=32, **MODELS[name]))
    model = randomise(odelm.create(config, rngs=nnx.Rngs(0)), scale=0.4)
    made = quantized(model, kind, np.array([[3, 1, 4, 5, 9, 2, 6]], np.int32))
    generator = Generator(made, steps=2)
    prompts = [[3, 1, 4], [9, 2, 6, 5, 3, 5]]
    found = generator(prompts, new_tokens=7)
    for prompt, text in zip(prompts, found, strict=True):
        assert text == generate(generator.runner, prompt, plan=generator.plan, new_tokens=7, temperature=0)


def test_an_encoder_embeds_texts_as_before_quantisation(make_model, tokens):
    model = make_model(dtype="float32", **POST)
    rows = [row.tolist() for row in tokens]
    exact, found = (
        np.asarray(odelm.EncoderRunner(one, steps=2).embed(rows)) for one in (model, odelm.quantize(model, "int8"))
    )
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    # 17 matrices along the depth, each of which rounds to 2^-8 of its largest entry.
    assert 0 < error < 0.05


@pytest.mark.parametrize("kind, bound", [("int8", 0.05), ("fp8_static", 0.3)])
def test_models_without_a_readout_are_quantised(kind, bound, make_model, tokens):
    body = make_model(dtype="float32", **POST)
    classifier = Classifier.from_encoder(body, outputs=3, rngs=nnx.Rngs(0))
    bare = Encoder(body.config, pooled=True, rngs=nnx.Rngs(0))
    for model in (classifier, bare):
        made = quantized(model, kind, tokens)
        assert all(a.dtype.itemsize == 1 for name, a in parameters(made).items() if name.endswith("/kernel"))
        exact, found = (np.asarray(compiled(one)(tokens, steps=2)) for one in (model, made))
        # E4M3 rounds each value to 2^-4 of it, and three outputs are small sums of larger terms.
        assert 0 < np.linalg.norm(found - exact) < bound * np.linalg.norm(exact)


@pytest.mark.thorough
def test_a_solver_with_a_tolerance_crosses_a_quantised_model(make_model, tokens):
    model = make_model(dtype="float32")

    def encoded(model):
        return model.encode_adaptive(tokens, tolerance=0.1)[0]

    exact, found = (np.asarray(jitted(encoded, one)) for one in (model, odelm.quantize(model, "int8_dynamic")))
    assert 0 < np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("kind", few(list(KINDS), "int8", "fp8_static"))
def test_a_quantised_model_is_split_traced_once_and_promotes_no_dtype(kind, make_model, tokens):
    made = quantized(make_model(dtype="bfloat16", layer_rank=2, bias=True), kind, tokens)
    runner = Runner.of(made)
    forward = make_forward(runner.graph)
    plan = runner.plan(2, "euler")
    with jax.numpy_dtype_promotion("strict"):
        logits = [forward(runner.params, plan, jnp.asarray(tokens)) for _ in range(2)][0]
    assert forward._cache_size() == 1  # pyright: ignore
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, compiled(made)(tokens, plan=plan))
    own, run = ({name: array.dtype for name, array in parameters(one).items()} for one in (made, runner.model))
    assert run == own, "a runner casts nothing of it"
    eight = {dtype.name for dtype in own.values() if dtype.itemsize == 1}
    assert eight == {KINDS[kind].dtype}


def test_a_token_without_an_embedding_makes_nan(make_model, tokens):
    made = odelm.quantize(make_model(dtype="float32"), "int8")
    found = jitted(lambda model: model.embed.rows(jnp.array([[0, 13, -1]])), made)
    assert np.isnan(found).any(-1).tolist() == [[False, True, True]]


@pytest.mark.parametrize("kind", ["int8", "fp8", "int8_dynamic", "fp8_dynamic"])
def test_no_loop_carries_a_copy_of_a_matrix_in_float(kind, make_config):
    """XLA takes what does not change out of a loop: then a float copy of all matrices would be there all the time."""
    config = make_config(dtype="float32", feedforward=328, vocab_size=32)
    runner = Runner.of(odelm.quantize(odelm.create(config, rngs=nnx.Rngs(0)), kind))
    arguments = runner.params, runner.plan(4, "euler"), jnp.zeros((1, 2), jnp.int32)
    program = jax.jit(make_forward(runner.graph)).lower(*arguments).compile().as_text()
    loops = [line for line in program.splitlines() if " while(" in line]
    carried = [dtype for line in loops for dtype in re.findall(r"(\w+)\[(?:16,328|328,16)\]", line.split(" while(")[0])]
    assert set(carried) == {{"int8": "s8", "float8_e4m3fn": "f8e4m3fn"}[KINDS[kind].dtype]}


def test_errors_say_what_was_given(make_model, tokens, tmp_path):
    model = make_model(dtype="float32")
    made = odelm.quantize(model, "int8")
    quantise = partial(odelm.quantize, model)
    other = model.plan(steps=2, integrator="diffrax")
    broken = load_parameters(model, {"final_norm/scale": np.full(16, np.nan, np.float32)})
    for call, words in [
        (lambda: quantise("int9"), "int9.*int8"),
        (lambda: odelm.quantize(made, "int8"), "quantised already, as int8"),
        (lambda: quantise("int8", calibration=[tokens]), "'int8' takes no calibration.*int8_static"),
        (lambda: odelm.quantize(None, "int8"), "model is None, expected a model of odelm"),
        (lambda: quantise("int8_static"), "'int8_static' needs calibration"),
        (lambda: quantise("int8_static", calibration=[]), "no batches"),
        (lambda: quantise("int8_static", calibration=[tokens], plan=[]), "plan is empty"),
        (lambda: quantise("int8_static", calibration=[tokens], plan=other), "'scan'.*'diffrax'"),
        (lambda: quantise("int8_static", calibration=[tokens + 13]), "expected 0 to 12"),
        (lambda: odelm.quantize(broken, "int8_static", calibration=[tokens]), "inputs of .* are not finite"),
        (lambda: Generator(made, dtype="bfloat16"), "dtype before it is quantised"),
        (lambda: forward_artifacts(made, steps=[2]), "quantised, as int8: export"),
        (lambda: bundle.write(tmp_path / "a", made, odelm.Config(model=model.config)), "quantised, as int8.*bundle"),
        (lambda: interop.export(made, tmp_path / "b"), "quantised, as int8: export"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
    assert not list(tmp_path.iterdir())

"""The operations of a token against those that XLA counts."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import odelm
from odelm.train import flops


@pytest.mark.parametrize(
    "options",
    [{}, dict(activation="swiglu"), dict(embed_dim=32, tie_readout=False), dict(prelude=1, coda=1), dict(kv_heads=1)],
)
def test_a_forward_pass_is_a_third_of_what_training_needs(options):
    config = odelm.ModelConfig(width=128, heads=4, depth=6, vocab_size=512, max_length=64, dtype="float32", **options)
    model = nnx.eval_shape(lambda: odelm.create(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def logits(params, tokens):
        model = nnx.merge(graph, params)
        return model(tokens, plan=model.plan(steps=2, unroll=True))

    counted = jax.jit(logits).lower(params, tokens).compile().cost_analysis()["flops"]
    needed = flops.training_flops(config, steps=2, length=64) / 3 * 2 * 64
    # XLA counts causal attention whole, and norms and activations too.
    assert needed == pytest.approx(counted, rel=0.08) and needed < counted


def test_an_encoder_reads_out_what_it_predicts_only():
    config = odelm.ModelConfig(kind="encoder", vocab_size=50_000)
    whole, part = (flops.training_flops(config, steps=12, length=128, predicted=p) for p in (1.0, 0.15))
    assert whole - part == pytest.approx(0.85 * 6 * (128 * 50_000 + 128 * 128))


@pytest.mark.parametrize(
    ("kind", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("cpu", None)]
)
def test_the_peak_is_that_of_the_card(monkeypatch, kind, peak):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert flops.peak_flops() == peak


def test_the_cost_is_told_against_full_depth():
    config = odelm.Config(model=odelm.ModelConfig(width=256, heads=4, vocab_size=16, max_length=128))
    fixed = odelm.Config(model=config.model, step_sampling=odelm.StepSamplingConfig(kind="fixed"))
    assert flops.cost_of(fixed, 10).startswith("updates of 12.0 of 12 depth steps on average needed 100% of the")
    # Counts of 3, 4, 6 and 12, and a readout of nothing to speak of.
    told = flops.cost_of(config, 4000)
    assert abs(float(told.split()[2]) - 6.25) < 0.3 and abs(float(told.split("needed ")[1].split("%")[0]) - 52) < 3


@pytest.mark.parametrize("outputs", [0, 2])
def test_the_cost_has_no_readout_of_tokens_that_are_not_predicted(outputs):
    given = dict(kind="encoder", width=32, heads=2, depth=4, vocab_size=30_000, max_length=32, outputs=outputs)
    task = dict(task="rte", source="GLUE") if outputs else {}
    config = odelm.Config(
        model=odelm.ModelConfig(**given),
        data=odelm.DataConfig(**task),
        step_sampling=odelm.StepSamplingConfig(counts=(2,), weights=(1.0,)),
    )
    share = flops.predicted_share(config)
    assert share == (0.0 if outputs else config.data.mask_rate)

    def half(predicted: float) -> float:
        given = dict(length=config.train.length, predicted=predicted)
        few, full = (flops.training_flops(config.model, steps=steps, **given) for steps in (2, 4))
        return few / full

    assert half(share) < 0.9 < half(1.0), "the readout of all tokens would be most of the operations"
    assert f"needed {half(share):.0%} of the" in flops.cost_of(config, 10)

"""Logits, hidden states and gradients agree with those of `transformers`, which we did not write."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import interop
from odelm.interop import tensors as layouts
from odelm.interop.convert import _parts
from odelm.interop.reader import FAMILIES
from odelm.models.loss import loss_sums
from odelm.models.parameters import parameters
from odelm.models.view import see
from tests.interop.cases import CASES, VOCAB, Case
from tests.interop.conftest import Inputs, difference, needed, redrawn

torch = needed("torch")
transformers = needed("transformers")

RELATIVE = 2e-5
"""Float32 carries 6e-8; up to 24 layers of sums of up to 512 terms, in another order, make some hundred of it."""

IDS = [case.name for case in CASES]


def inputs_of(case: Case, length: int, padded: int) -> Inputs:
    gpt2 = case.config == "GPT2Config"
    # GPT-2 takes its positions from the mask in some calls and not in others; padding on the right needs none.
    return Inputs.drawn(length, vocab_size=VOCAB, padded=padded, types=not gpt2)


def outputs(model, inputs: Inputs):
    with torch.no_grad():
        return model(**inputs.torch(), output_hidden_states=True)


def main_output(out) -> np.ndarray:
    for name in ("logits", "prediction_logits", "pooler_output", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name).numpy()
    raise AssertionError("no output")


def states_of(model, inputs: Inputs) -> list[jax.Array]:
    """Returns the hidden states before the first block and after each, as transformers lists them."""
    call = odelm.models.Inputs(inputs["tokens"], mask=inputs["mask"], token_types=inputs.get("token_types"))
    given, view, _ = see(call, model.config, None)
    h = model.embed(given)
    states, depth = [h], model.config.depth
    for t in range(depth):
        for _, block in _parts(model.blocks[t * model.config.groups // depth]):
            h = block(h, t, view=view)
            states.append(h)
    if model.final_norm is not None:
        states[-1] = model.final_norm(h)
    return states


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize(("length", "padded"), [(17, 6), (24, 0), (2, 1)])
def test_outputs_agree(case, length, padded, saved):
    theirs = redrawn(case.make())
    ours, _, tokenizer = odelm.load(saved(theirs))
    assert tokenizer is None
    inputs = inputs_of(case, length, padded)
    out = outputs(theirs, inputs)
    if case.model == "GPT2Model":
        assert difference(ours.encode(inputs["tokens"], **inputs.options()), out[0].numpy(), inputs["mask"]) < RELATIVE
        return
    assert difference(ours(inputs["tokens"], **inputs.options()), main_output(out), inputs["mask"]) < RELATIVE
    order = getattr(out, "sop_logits", getattr(out, "seq_relationship_logits", None))
    if order is not None:
        hidden = ours.encode(inputs["tokens"], **inputs.options())
        assert difference(ours.readout_order(hidden), order.numpy()) < RELATIVE  # pyright: ignore


@pytest.mark.parametrize("case", [case for case in CASES if not case.name.endswith("bare")], ids=lambda c: c.name)
def test_hidden_states_agree_at_every_depth(case, saved):
    theirs = redrawn(case.make())
    ours, _, _ = odelm.load(saved(theirs))
    inputs = inputs_of(case, 17, 6)
    expected = outputs(theirs, inputs).hidden_states
    states = states_of(ours, inputs)
    # ALBERT and BERT list the embeddings before ALBERT's projection, which is not a state of ours.
    assert len(states) == len(expected)
    start = 1 if states[0].shape != expected[0].shape else 0
    for got, want in zip(states[start:], expected[start:], strict=True):
        assert difference(got, want.numpy(), inputs["mask"]) < RELATIVE


def language_batch(inputs: Inputs, case: Case) -> dict[str, np.ndarray]:
    """Returns targets for a batch: at every position of a decoder, at three of an encoder."""
    tokens, mask = inputs["tokens"], inputs["mask"]
    if case.config == "GPT2Config":
        weights = (mask[:, 1:] & mask[:, :-1]).astype(np.float32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "mask": mask[:, :-1]}
    positions = np.tile(np.array([1, 4, 9], np.int32), (3, 1))
    targets = (np.take_along_axis(tokens, positions, 1) + 5) % VOCAB
    batch = dict(inputs) | {"positions": positions, "targets": targets, "weights": np.ones((3, 3), np.float32)}
    order = {"order": np.array([0, 1, 1], np.int32), "order_weights": np.ones(3, np.float32)}
    return batch | (order if "order" in case.name else {})


def their_loss(model, inputs: Inputs, case: Case, batch):
    labels = np.full(inputs["tokens"].shape, -100)
    if case.config == "GPT2Config":
        labels[:, 1:] = np.where(batch["weights"] > 0, batch["targets"], -100)
        return model(**inputs.torch(), labels=torch.tensor(labels)).loss
    np.put_along_axis(labels, batch["positions"], batch["targets"], 1)
    extra = {}
    if "order" in batch:
        name = "sentence_order_label" if case.config == "AlbertConfig" else "next_sentence_label"
        extra = {name: torch.tensor(batch["order"]).long()}
    return model(**inputs.torch(), labels=torch.tensor(labels), **extra).loss


LANGUAGE = [c for c in CASES if c.model in ("AlbertForMaskedLM", "AlbertForPreTraining", "BertForMaskedLM",
                                            "BertForPreTraining", "GPT2LMHeadModel")]  # fmt: skip


def check_gradients(case: Case, theirs, ours, folder) -> None:
    inputs = inputs_of(case, 17, 6)
    batch = language_batch(inputs, case)
    loss = their_loss(theirs, inputs, case, batch)
    loss.backward()
    graph, params = nnx.split(ours, nnx.Param)
    objective, grads = jax.value_and_grad(lambda p: loss_sums(nnx.merge(graph, p), batch).objective)(params)
    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    got = layouts.write(family.entries(ours), parameters(nnx.merge(graph, grads)))
    want = {
        name.removeprefix(family.prefix): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    if case.name in ("gpt2-by-layer", "gpt2-unscaled"):
        # The scale of their attention is in our queries, whose gradients are therefore others.
        got = {name: gradient for name, gradient in got.items() if "c_attn" not in name}
    largest = max(np.abs(gradient).max() for gradient in want.values())
    for name, gradient in got.items():
        # Keys' biases shift every logit of a row alike: their gradient is nothing but rounding. Those of queries and
        # keys are sums in which nearly all cancels, of terms of the largest's size, each with a float32's rounding of
        # 6e-8: five of these are allowed (one or two were seen).
        scale = max(np.abs(want[name]).max(), 3e-3 * largest)
        assert np.abs(gradient - want[name]).max() < 1e-4 * scale, f"the gradient of {name} differs"
    assert float(objective) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("case", LANGUAGE, ids=lambda c: c.name)
def test_gradients_agree(case, saved):
    theirs = redrawn(case.make())
    folder = saved(theirs)
    check_gradients(case, theirs, odelm.load(folder)[0], folder)


# Ends of names of a matrix to transpose, of two tensors of one shape to swap, and of a norm to scale.
PLACES = {
    "albert-base-v2": (
        "attention.dense.weight",
        ("attention.query.weight", "attention.key.weight"),
        "LayerNorm.weight",
    ),
    "bert-base": ("output.dense.weight", ("self.query.weight", "self.key.weight"), "LayerNorm.weight"),
    "gpt2-small": ("attn.c_proj.weight", ("ln_1.weight", "ln_2.weight"), "ln_2.weight"),
}


def planted(kind: str, name: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors with a difference in one layer."""
    square, pair, scaled = PLACES[name]

    def last(end: str) -> str:
        found = [n for n in tensors if n.endswith(end) and tensors[n].shape[0] == tensors[n].shape[-1]]
        return sorted(n for n in found if "embeddings" not in n and "predictions" not in n)[-1]

    if kind == "transposed":
        return tensors | {last(square): np.ascontiguousarray(tensors[last(square)].T)}
    if kind == "swapped":
        one, other = (last(end) for end in pair)
        return tensors | {one: tensors[other], other: tensors[one]}
    return tensors | {last(scaled): tensors[last(scaled)] * np.float32(1.001)}


@pytest.mark.parametrize("kind", ["transposed", "swapped", "mis-scaled"])
@pytest.mark.parametrize("name", PLACES)
def test_every_comparison_sees_a_planted_difference(name, kind, saved):
    from safetensors.numpy import load_file, save_file

    case = next(case for case in CASES if case.name == name)
    theirs = redrawn(case.make())
    folder = saved(theirs)
    file = folder / "model.safetensors"
    save_file(planted(kind, name, load_file(file)), file, metadata={"format": "pt"})
    ours, _, _ = odelm.load(folder)
    inputs = inputs_of(case, 17, 6)
    out = outputs(theirs, inputs)
    assert difference(ours(inputs["tokens"], **inputs.options()), main_output(out), inputs["mask"]) > 2 * RELATIVE
    last = states_of(ours, inputs)[-1]
    assert difference(last, out.hidden_states[-1].numpy(), inputs["mask"]) > 2 * RELATIVE
    with pytest.raises(AssertionError, match="differs"):
        check_gradients(case, theirs, ours, folder)


def test_shards_and_other_dtypes_are_read(saved):
    theirs = redrawn(CASES[0].make())
    sharded = saved(theirs, max_shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").exists() and not (sharded / "model.safetensors").exists()
    whole, parts = interop.read(saved(theirs)).model, interop.read(sharded).model
    for name, array in parameters(whole).items():
        np.testing.assert_array_equal(array, parameters(parts)[name])
    half = interop.read(saved(theirs.to(torch.bfloat16))).model
    for name, array in parameters(whole).items():
        assert parameters(half)[name].dtype == np.float32
        np.testing.assert_allclose(parameters(half)[name], array, rtol=2**-8)

"""Fewer heads of keys and values: the ordinary model whose heads are copies, with less to learn and to keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import odelm
from odelm import interop
from odelm.config import OptimizerConfig
from odelm.errors import InputError
from odelm.models.attention import attend
from odelm.models.parameters import abstract_like, name_of, parameters, with_parameters
from odelm.sharding import state_shardings
from tests.calls import compiled
from tests.thorough import few
from tests.unit.train.test_step import config_of, on_devices, prepared, updated

FEWER = dict(heads=4, width=32, kv_heads=2)
MODELS = {
    "two": dict(bias=True),
    "one": dict(kv_heads=1, positions="learned", qk_norm=False),
    "encoder": dict(kind="encoder", norm_placement="post", norm="layernorm", bias=True),
    "chain": dict(inner_blocks=2, bias=True, layer_rank=2),
    "lanes, wide": dict(lanes=2, wide_modulation=True, positions="sinusoidal"),
    "ends, residuals": dict(depth=6, prelude=1, coda=1, layer_rank=2, wide_modulation=True),
    "groups, parallel": dict(groups=2, parallel_branches=True, activation="swiglu", layer_rank=1),
}


def repeated(model):
    """Returns the model with as many heads of keys and values as of queries, each a copy of the one it stands for.

    Queries, keys and values have one residual there in place of two, so it is of twice the rank.
    """
    config = dataclasses.replace(model.config, kv_heads=None, layer_rank=2 * model.config.layer_rank)
    result, given = abstract_like(model, config), parameters(model)
    H, J, K = config.heads, model.config.kv_heads, config.head_size

    def joined(query: np.ndarray, key_value: np.ndarray) -> np.ndarray:
        """Returns (.., 3 H K) of (.., H K) and (.., 2 J K)."""
        first = query.shape[:-1]
        both = np.repeat(key_value.reshape(*first, 2, J, K), H // J, axis=-2)
        return np.concatenate([query.reshape(*first, 1, H, K), both], axis=-3).reshape(*first, -1)

    def made(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in given and given[name].shape == shape:
            return np.asarray(given[name])
        if "modulation/wide" in name:
            one = np.asarray(given[name])
            query, key_value, hidden = np.split(one, [H * K, H * K + 2 * J * K], axis=-1)
            return np.concatenate([joined(query, key_value), hidden], axis=-1)
        if "/residual/" in name and "qkv" not in name:
            one = np.asarray(given[name])
            return np.pad(one, [(0, size - had) for size, had in zip(shape, one.shape, strict=True)])
        query, key_value = (np.asarray(given[name.replace("qkv", part)]) for part in ("query", "key_value"))
        if name.endswith("/down"):
            return np.concatenate([query, key_value], axis=-1)
        if name.endswith("/up"):
            zero = np.zeros_like
            return np.concatenate([joined(query, zero(key_value)), joined(zero(query), key_value)], axis=-2)
        first = shape[: len(shape) - (1 if "/residual/" in name else 3)]
        return joined(query.reshape(*first, -1), key_value.reshape(*first, -1)).reshape(shape)

    shapes = {name: leaf.shape for name, leaf in parameters(result).items()}
    return with_parameters(result, {name: jnp.asarray(made(name, shape)) for name, shape in shapes.items()})


@pytest.mark.parametrize("options", few(MODELS, list(MODELS)[-1]))
def test_it_is_the_model_whose_keys_and_values_are_repeated(options, make_model, tokens):
    model = make_model(**FEWER | options)
    copies = repeated(model)
    segments = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]], np.int32)
    for call in (dict(), dict(steps=2, segments=segments)):
        # float32 sums in another order, over logits of order one.
        np.testing.assert_allclose(compiled(model)(tokens, **call), compiled(copies)(tokens, **call), rtol=0, atol=3e-5)
    own, ordinary = (sum(a.size for a in parameters(m).values()) for m in (model, copies))
    assert own < ordinary


def test_as_many_as_heads_is_the_ordinary_model_to_the_bit(make_config, tokens):
    for options in (dict(), dict(bias=True, layer_rank=2, wide_modulation=True)):
        given = [odelm.create(make_config(kv_heads=kv, **options), rngs=nnx.Rngs(0)) for kv in (None, 2)]
        one, other = (parameters(model) for model in given)
        assert list(one) == list(other) and "blocks/0/attention/qkv/kernel" in one
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)
        np.testing.assert_array_equal(compiled(given[0])(tokens, steps=2), compiled(given[1])(tokens, steps=2))


def test_parameters_of_their_own(make_config):
    named = parameters(odelm.create(make_config(**FEWER, bias=True), rngs=nnx.Rngs(0)))
    shapes = {name.removeprefix("blocks/0/attention/"): array.shape for name, array in named.items()}
    assert shapes["query/kernel"] == (32, 4, 8) and shapes["query/bias"] == (4, 8)
    assert shapes["key_value/kernel"] == (32, 2, 2, 8) and shapes["key_value/bias"] == (2, 2, 8)
    assert not any("qkv" in name for name in shapes)
    # Of unit scale whatever is cut: 1 / sqrt(D), known to a few per cent from 1024 draws.
    for name in ("query/kernel", "key_value/kernel"):
        assert np.std(named[f"blocks/0/attention/{name}"]) == pytest.approx(32**-0.5, rel=0.1)


def test_a_memory_is_smaller_by_as_much(make_model):
    sizes = {}
    for kv in (None, 2, 1):
        model = make_model(**FEWER | dict(kv_heads=kv))
        memory = model.memory(compiled(model.plan)(steps=2), batch=2, room=8)
        sizes[kv] = sum(leaf.nbytes for leaf in jax.tree.leaves(memory.blocks))
    assert sizes[None] == 2 * sizes[2] == 4 * sizes[1]


def test_gradients_are_those_of_the_copies_added_up(make_model, tokens):
    model = make_model(**FEWER, bias=True)

    def gradient(model):
        graph, params = nnx.split(model)
        grads = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(tokens, steps=2)).sum()))(params)
        return parameters(nnx.merge(graph, grads))

    own, ordinary = gradient(model), gradient(repeated(model))
    for part in ("kernel", "bias"):
        query, key, value = np.moveaxis(np.asarray(ordinary[f"blocks/0/attention/qkv/{part}"]), -3, 0)
        summed = np.stack([x.reshape(*x.shape[:-2], 2, 2, 8).sum(-2) for x in (key, value)], axis=-3)
        for name, exact in (("query", query), ("key_value", summed)):
            found = own[f"blocks/0/attention/{name}/{part}"]
            np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shared", [1, 2])
def test_cudnn_agrees(causal, shared):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 256, heads, 64)), jnp.bfloat16) for heads in (4, shared, shared))
    mask = (jnp.arange(256)[None] < jnp.array([[256], [200]]))[:, None, None, :]

    def of(name, *parts):
        def total(*parts):
            out = attend(*parts, mask=mask, causal=causal, implementation=name)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*parts)

    (_, exact), (_, found) = of("xla", *(x.astype(jnp.float32) for x in (q, k, v))), of("cudnn", q, k, v)
    for got, want in zip(found, exact, strict=True):
        # bfloat16 keeps 8 bits; an average and its gradient chain a handful of roundings.
        assert jnp.linalg.norm(got - want) < 5 * 2**-8 * jnp.linalg.norm(want)


MORE = dict(layer_rank=2, wide_modulation=True, reference_width=16, bias=True)
LEARNT = {
    "adamw": ("adamw", {}), "muon": ("muon", {}), "adamw, more": ("adamw", MORE), "muon, more": ("muon", MORE),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "options"), LEARNT.values(), ids=LEARNT)
def test_it_learns(kind, options):
    config = trained_config(kind=kind, **options)
    update, state, batch, _ = prepared(config)
    before, update, losses = parameters_of(state.params), jax.jit(update), []
    for _ in range(6):
        state, metrics = update(state, batch, np.array([0, 2, 4], np.float32))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.2
    for name, array in parameters_of(state.params).items():
        assert np.isfinite(array).all() and np.abs(array - before[name]).max() > 5e-3, name  # decay moves 3e-3


def trained_config(mesh: tuple[int, int, int] = (1, 1, 1), kind: str = "adamw", **options) -> odelm.Config:
    config = config_of(mesh, **options)
    model = dataclasses.replace(config.model, heads=8, kv_heads=4)
    return dataclasses.replace(config, model=model, optimizer=OptimizerConfig(kind=kind, learning_rate=0.01, warmup=0))


def parameters_of(state) -> dict[str, np.ndarray]:
    return {name_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


ON_A_MESH = """
import jax, numpy as np
from tests.unit.models.test_kv_heads import trained_config
from tests.unit.train.test_step import updated
state, metrics = updated(trained_config(mesh, wide_modulation=True, layer_rank=2))
kernel = state.params["blocks"][0]["attention"]["key_value"]["kernel"][...]
assert kernel.addressable_shards[0].data.shape == (32 // mesh[1], 2, 4 // mesh[2], 4)
np.savez(file, metrics["loss"], metrics["gradient_norm"], *jax.tree.leaves(state.params))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", [(1, 2, 2), (1, 1, 4)])
def test_a_mesh_cuts_the_heads_of_keys_and_values(mesh, tmp_path):
    file = tmp_path / "updated.npz"
    on_devices(4, f"mesh, file = {mesh}, {str(file)!r}\n{ON_A_MESH}")
    state, metrics = updated(trained_config(wide_modulation=True, layer_rank=2))
    one = [metrics["loss"], metrics["gradient_norm"], *jax.tree.leaves(state.params)]
    for shared, single in zip(np.load(file).values(), one, strict=True):
        # As in tests/unit/train/test_step.py, for a learning rate of 1e-2.
        np.testing.assert_allclose(shared, single, rtol=1e-4, atol=1e-3)


def test_heads_that_a_mesh_does_not_divide_are_refused(make_config):
    mesh = jax.sharding.AbstractMesh((1, 1, 2), ("data", "fsdp", "tensor"))
    for kv, fits in ((2, True), (1, False)):
        config = make_config(**FEWER | dict(kv_heads=kv), vocab_size=16)
        params = nnx.state(nnx.eval_shape(lambda c=config: odelm.create(c, rngs=nnx.Rngs(0))), nnx.Param)
        if fits:
            cut = state_shardings(params, mesh)
            spec = cut["blocks"][0]["attention"]["key_value"]["kernel"]
            assert jax.tree.leaves(spec)[0].spec[2] == "tensor"
            continue
        with pytest.raises(InputError, match="mesh.tensor is 2, which does not divide blocks/0/attention/key_value"):
            state_shardings(params, mesh)


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        (3, r"model.kv_heads is 3, which does not divide model.heads \(4\); the nearest that does is 2"),
        (8, "model.kv_heads is 8, which does not divide model.heads"),
        (0, "model.kv_heads is 0, expected a positive whole number"),
        (-2, "model.kv_heads is -2"),
    ],
)
def test_counts_that_do_not_divide_the_heads_are_refused(kv, words, make_config):
    with pytest.raises(InputError, match=words):
        make_config(**FEWER | dict(kv_heads=kv)).validate()


@pytest.mark.parametrize("options", [dict(), dict(kind="encoder", norm_placement="post", embed_norm=True)])
def test_a_folder_cannot_hold_them(options, make_model, tmp_path):
    shape = dict(norm="layernorm", qk_norm=False, positions="learned", activation="gelu", **options)
    with pytest.raises(InputError, match=r"no equivalent in \w+ of model.kv_heads=2 \(only as many as heads\)$"):
        interop.export(make_model(**FEWER, **shape), tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""The table of partitions covers every parameter, and no row of it is in vain."""

import re

import jax
import pytest
from flax import nnx

import odelm
from odelm import sharding
from odelm.config import MeshConfig
from odelm.errors import InputError
from odelm.models.parameters import name_of, parameters

WHOLE = dict(bias=True, norm="layernorm", prelude=1, coda=1, depth=6)
MODELS = [
    dict(**WHOLE, layer_rank=2, activation="swiglu", embed_dim=8),
    dict(**WHOLE, positions="learned", tie_readout=False),
    dict(lanes=2, wide_modulation=True),
    dict(kv_heads=1, bias=True, layer_rank=2),
    dict(kind="encoder", norm_placement="post", norm="layernorm", bias=True, token_types=2, sentence_order=True,
         embed_dim=8, embed_norm=True, inner_blocks=2, positions="learned"),
]  # fmt: skip


@pytest.fixture(scope="module")
def named(make_config) -> dict[str, tuple[int, ...]]:
    """Returns every kind of parameter that there is, with its shape."""
    found = {}
    for options in MODELS:
        model = nnx.eval_shape(lambda o=options: odelm.create(make_config(**o), rngs=nnx.Rngs(0)))
        found |= {name: leaf.shape for name, leaf in parameters(model).items()}
    classifier = nnx.eval_shape(
        lambda: odelm.models.Classifier(make_config(kind="encoder"), outputs=2, rngs=nnx.Rngs(0))
    )
    return found | {name: leaf.shape for name, leaf in parameters(classifier).items()}


def test_every_row_matches_a_parameter_and_every_parameter_a_row(named):
    for pattern, _ in sharding.LOGICAL_AXES:
        assert any(re.fullmatch(pattern, name) for name in named), pattern
    for name, shape in named.items():
        axes = sharding.logical_axes(name)
        assert axes is not None and len(axes) in (0, len(shape)), (name, shape)
        assert sharding.logical_axes(f"1/0/mu/{name}") == axes
        # What is held whole is small: vectors, one for each layer at most, and matrices of a fixed size or for a head.
        small = len(shape) == 1 or name.endswith(("bias", "scale")) or "modulation/hidden" in name
        small = small or name.endswith("by_time")
        assert any(axes) or small or name.startswith(("order", "head")), name
    assert sharding.logical_axes("0/count") == ()


def test_an_unknown_parameter_is_an_error():
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(InputError, match="no pattern of odelm.sharding.LOGICAL_AXES matches blocks/0/extra/kernel"):
        sharding.state_shardings({"blocks": {"0": {"extra": {"kernel": jax.ShapeDtypeStruct((2, 2), float)}}}}, mesh)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(data=3), "mesh.data=3, mesh.fsdp=1, mesh.tensor=1, but there are 1 devices; -1 takes what is left"),
        (dict(data=-1, tensor=2), "-1 takes what is left, which must divide evenly"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        sharding.make_mesh(MeshConfig(**options))


def test_two_axes_cannot_both_take_what_is_left():
    with pytest.raises(InputError, match="expected -1, which takes what is left, of one axis only"):
        MeshConfig(data=-1, fsdp=-1).validate()


def test_a_parameter_that_the_mesh_does_not_divide_is_named():
    mesh = jax.sharding.AbstractMesh((1, 1, 4), ("data", "fsdp", "tensor"))
    tree = {"blocks": {"0": {"attention": {"qkv": {"kernel": jax.ShapeDtypeStruct((8, 3, 6, 4), float)}}}}}
    with pytest.raises(InputError, match=r"mesh.tensor is 4, which does not divide blocks/0/attention/qkv/kernel"):
        sharding.state_shardings(tree, mesh)


def test_the_summary_is_one_table_of_axes_parameters_and_bytes():
    mesh = jax.sharding.AbstractMesh((1, 2, 4), ("data", "fsdp", "tensor"))
    model = odelm.create(odelm.ModelConfig(width=32, heads=4, vocab_size=64, max_length=8), rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    axes, heading, *rows = sharding.summary(params, mesh)
    assert axes == "logical axes: batch -> data 1, fsdp 2; vocab, heads, hidden -> tensor 4; width -> fsdp 2"
    assert heading.split() == ["cut", "by", "MB", "a", "device", "parameters"]
    # 64 x 32 tokens, 32 x 3 x 32 and 32 x 32 of attention, and 2 x 32 x 128 of the feed-forward, in float32.
    both = 4 * (64 * 32 + 4 * 32 * 32 + 2 * 32 * 128)
    assert rows[0].startswith(f"{'fsdp 2, tensor 4':<18}{both / 1e6:>10.2f}{both / 8e6:>10.2f}  blocks/*/attention/")
    assert "blocks/*/attention/{out,qkv}/kernel" in rows[0] and "embed/tokens" in rows[0] + rows[1]
    cuts = [row[:18].strip() for row in rows if row[:18].strip()]
    assert cuts == ["fsdp 2, tensor 4", "fsdp 2", "nothing"]


def test_a_cut_is_one_row_whatever_the_order_of_its_axes():
    """Of attention's output the first axis is cut by tensor, of its input the last."""
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    kernels = {"out": jax.ShapeDtypeStruct((2, 4, 8), "float32"), "query": jax.ShapeDtypeStruct((8, 2, 4), "float32")}
    attention = {name: {"kernel": shape} for name, shape in kernels.items()}
    _, _, row = sharding.summary({"blocks": {"0": {"attention": attention}}}, mesh)
    assert row.split() == ["fsdp", "2,", "tensor", "2", "0.00", "0.00", "blocks/*/attention/{out,query}/kernel"]


def test_one_process_brings_the_whole_batch():
    assert sharding.batch_share(sharding.make_mesh(MeshConfig())) == (0, 1)


def test_names_are_those_of_paths():
    params = nnx.state(odelm.create(odelm.ModelConfig(width=32, heads=4), rngs=nnx.Rngs(0)), nnx.Param)
    names = {name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert "blocks/0/attention/qkv/kernel" in names

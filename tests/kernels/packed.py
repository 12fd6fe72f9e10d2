"""Compiles for a card that is not there what trains on rows of packed documents: `python -m tests.kernels.packed FILE`.

FILE describes the card. The program that XLA makes is printed.
"""

import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

import odelm
from benchmarks.absent_card import UNTIMED, card_of, shapes_on
from odelm.models.loss import loss_sums


def main() -> None:
    card = card_of(Path(sys.argv[1]))
    shape = odelm.ModelConfig(
        kind="decoder", vocab_size=512, width=128, heads=2, depth=2, max_length=256, dtype="bfloat16"
    )
    graph, params = nnx.split(odelm.create(shape, rngs=nnx.Rngs(0)))
    rows = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    batch = {"tokens": rows, "targets": rows, "segments": rows, "weights": jax.ShapeDtypeStruct((8, 256), jnp.float32)}

    def loss(params: object, batch: dict) -> jax.Array:
        model = nnx.merge(graph, params)
        return loss_sums(model, batch, plan=model.plan(steps=1)).objective

    # The kernel asks for a card by its name, and knows of no H200.
    kind = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    there = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind))
    with mock.patch.object(jax, "default_backend", lambda: "gpu"), there:
        lowered = jax.jit(jax.grad(loss)).lower(*shapes_on(card, (jax.eval_shape(lambda: params), batch)))
    print(lowered.compile(compiler_options=UNTIMED).as_text())


if __name__ == "__main__":
    main()

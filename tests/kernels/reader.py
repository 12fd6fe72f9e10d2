"""Prints the program by which an encoder reads 8 x 512 tokens on a card that is not there:

python -m tests.kernels.reader benchmarks/h200.textproto
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import odelm
from benchmarks.absent_card import UNTIMED, card_of, shapes_on
from odelm.infer import on_gpu
from odelm.infer.runner import Runner
from odelm.models import Inputs

B, L = 8, 512


def main() -> None:
    options = dict(norm="layernorm", norm_placement="post", positions="learned", qk_norm=False, bias=True)
    config = odelm.ModelConfig(
        kind="encoder", vocab_size=100, width=768, heads=12, depth=2, max_length=L, dtype="bfloat16", attention="xla",
        time_modulation=False, **options,
    )  # fmt: skip
    runner = Runner.of(odelm.create(config, rngs=nnx.Rngs(0)))

    def read(params: Any, plan: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        model = on_gpu.with_separate_maps(nnx.merge(runner.graph, params))
        return model.encode(Inputs(tokens, lengths=lengths), plan=on_gpu.unrolled(plan))

    given = runner.params, runner.plan(2, "euler"), jnp.zeros((B, L), jnp.int32), jnp.full(B, L, jnp.int32)
    lowered = jax.jit(read).lower(*shapes_on(card_of(Path(sys.argv[1])), given))
    print(lowered.compile(compiler_options=on_gpu.COMPILER_OPTIONS | UNTIMED).as_text())


if __name__ == "__main__":
    main()

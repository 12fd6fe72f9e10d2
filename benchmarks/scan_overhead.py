"""The fixed-grid integration against a hand-written `lax.scan` of the same block, taking turns.

    python -m benchmarks.scan_overhead [--batch=8] [--length=128] [--repeats=60]

Prints the ratio of the medians for inference and for the gradient; 1.00 is no cost at all.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

import odelm
from benchmarks import run_program
from benchmarks.options import whole
from odelm.infer.latency import measure
from odelm.models import BlockField


def handwritten(block: odelm.SharedBlock, h: jax.Array, depth: int) -> jax.Array:
    """Returns the state after `depth` residual layers that share one block, as anyone would write it."""
    times = jnp.arange(depth, dtype=jnp.float32)

    def layer(h: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        return h + block.increment(block.condition(t), h)[0], None

    return jax.lax.scan(layer, h, times)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=whole, default=8)
    parser.add_argument("--length", type=whole, default=128)
    parser.add_argument("--width", type=whole, default=256)
    parser.add_argument("--repeats", type=whole, default=60)
    arguments = parser.parse_args()
    config = odelm.ModelConfig(width=arguments.width, heads=4, depth=12)
    graph, params = nnx.split(odelm.SharedBlock(config, rngs=nnx.Rngs(0)), nnx.Param)
    h0 = jax.random.normal(jax.random.key(0), (arguments.batch, arguments.length, config.width))
    grid = odelm.ode.grid.equal(config.depth, config.depth)

    def ours(params: nnx.State, h: jax.Array) -> jax.Array:
        return odelm.integrate(BlockField(nnx.merge(graph, params)), h, grid)

    def by_hand(params: nnx.State, h: jax.Array) -> jax.Array:
        return handwritten(nnx.merge(graph, params), h, config.depth)

    def gradient(forward: Callable[..., jax.Array]) -> Callable[..., nnx.State]:
        return jax.jit(jax.grad(lambda params, h: jnp.square(forward(params, h)).mean()))

    assert jnp.array_equal(jax.jit(ours)(params, h0), jax.jit(by_hand)(params, h0)), "the two differ"
    for name, transform in (("forward", jax.jit), ("gradient", gradient)):
        pair = {"odelm": transform(ours), "by hand": transform(by_hand)}
        calls = {key: (lambda f=f: f(params, h0)) for key, f in pair.items()}
        times = measure(calls, repeats=arguments.repeats)
        ours_ms, by_hand_ms = times["odelm"].median, times["by hand"].median
        print(f"{name:9} odelm {ours_ms:8.2f} ms  by hand {by_hand_ms:8.2f} ms  ratio {ours_ms / by_hand_ms:.3f}")


if __name__ == "__main__":
    run_program(main)

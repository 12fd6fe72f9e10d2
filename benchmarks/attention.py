"""XLA's attention against cuDNN's by length, taking turns: where `model.attention="auto"` should choose which.

    python -m benchmarks.attention [--tokens=16384] [--heads=12] [--size=64] [--repeats=20] [--mask=padding]

With `--mask` each row has three quarters of real tokens (`padding`), or four `documents`; for these JAX's own kernel of
Pallas is timed too, which takes the number of each token's document where the others take a mask. Needs a GPU. Prints
milliseconds (medians) in bfloat16, forward and with gradients, and XLA's time over cuDNN's.
"""

import argparse
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks import run_program
from benchmarks.options import several, whole
from odelm.infer.latency import measure
from odelm.models.attention import attend
from odelm.models.packed_attention import packed_attention
from odelm.models.view import View

LENGTHS = (64, 128, 256, 512, 1024, 2048)


def mask_of(kind: str, length: int) -> jax.Array | None:
    """Returns which keys each query may attend to, as `odelm.models.View.allowed`."""
    index = jnp.arange(length)[None]
    if kind == "padding":
        return View(real=index < 3 * length // 4).allowed(length, causal=True)
    documents = index // (length // 4)
    return View(segments=(documents, documents)).allowed(length, causal=True) if kind == "documents" else None


def forward(causal: bool, implementation: str, mask: jax.Array | None):
    if implementation == "pallas":
        return jax.jit(partial(by_pallas, causal=causal))
    return jax.jit(lambda q, k, v: attend(q, k, v, mask=mask, causal=causal, implementation=implementation))


def by_pallas(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """Attention within four documents in each row, by the kernel for Triton that comes with JAX."""
    rows, length = q.shape[:2]
    documents = jnp.broadcast_to(jnp.arange(length) // (length // 4), (rows, length))
    return packed_attention(q, k, v, segments=documents, causal=causal)


def gradient(causal: bool, implementation: str, mask: jax.Array | None):
    call = forward(causal, implementation, mask)
    return jax.jit(jax.grad(lambda q, k, v: jnp.square(call(q, k, v).astype(jnp.float32)).mean(), (0, 1, 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=whole, default=16_384, help="in a batch, whatever the length")
    parser.add_argument("--heads", type=whole, default=12)
    parser.add_argument("--size", type=whole, default=64)
    parser.add_argument("--repeats", type=whole, default=20)
    parser.add_argument("--mask", choices=("none", "padding", "documents"), default="none")
    parser.add_argument("--lengths", type=several(whole), default=list(LENGTHS), help="A,B")
    options = parser.parse_args()
    print(jax.devices()[0].device_kind, f"jax {jax.__version__}", json.dumps(vars(options)))
    lengths: list[int] = options.lengths
    for transform, causal, length in itertools.product((forward, gradient), (True, False), lengths):
        shape = (max(options.tokens // length, 1), length, options.heads, options.size)
        q, k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))
        # A row for each sequence, as a batch has them.
        mask = mask_of(options.mask, length)
        mask = None if mask is None else jnp.broadcast_to(mask, (shape[0], *mask.shape[1:]))
        names = ("xla", "cudnn", "pallas") if options.mask == "documents" else ("xla", "cudnn")
        calls = {name: transform(causal, name, mask) for name in names}
        times = measure(
            {name: (lambda f=f, parts=(q, k, v): f(*parts)) for name, f in calls.items()}, repeats=options.repeats
        )
        row = {name: round(latency.median, 4) for name, latency in times.items()}
        kind = f"{transform.__name__}, {'causal' if causal else 'full'}, {shape[0]} x {length}"
        print(f"{kind:35} {json.dumps(row)} ratio {row['xla'] / row['cudnn']:.2f}", flush=True)


if __name__ == "__main__":
    run_program(main)
